"""A script that runs commands on the stores in a folder, and prints their results.

Its argument is the folder. For each name of a store on stdin, it prints a line of JSON for each command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import traceback
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  # finds the fonts of the machine, once per user
from click.testing import CliRunner
from fuzzing import restrict_file_access

from refdet.cli.main import describe, main
from refdet.data.coco import CocoIndex
from refdet.extraction.boxes_from_file import load_boxes
from refdet.files.printable_text import escape_unprintable
from refdet.store import (
    hdf5_access,
    hdf5_sandbox,  # noqa: F401  # imported here, as imports in a child would be watched
)
from refdet.store.known_files import FileState

BOXES = "boxes"
REFER = "refer"  # subfolder with refs on the images of the stores
ZONEINFO = "/usr/share/zoneinfo"  # read by pandas
_MEMORY = 4 << 30  # bytes of address space of a check: a fork of this process starts with more than the sandbox has
_CHECK_FAILED = 86  # exit code if the check itself raises an error
_results: dict[FileState, str] = {}


def commands(folder: Path, store: Path, out: Path) -> dict[str, list[str]]:
    """Commands that read a store, by name."""
    refer = ["--refer-root", str(folder / REFER)]
    store_options = ["--store", str(store)]
    return {
        "inspect": ["inspect", str(store)],
        "verify": ["inspect", "--verify", str(store)],
        "npz": ["export", "--format", "npz", *store_options, "--out", str(out)],
        "mattnet": ["export", "--format", "mattnet", *store_options, "--out", str(out)],
        "audit": ["audit", *store_options, *refer],
        BOXES: [str(store), str(folder / REFER / "toy" / "instances.json")],
        "evaluate": [
            "evaluate-on-refer",
            *store_options,
            *refer,
            "--dataset",
            "toy",
            "--split-by",
            "me",
            "--out",
            str(out),
        ],
    }


def read_boxes(store: str, instances: str) -> tuple[int, str, str]:
    """Read a store as `extract-features --boxes` does; returns what `run` does."""
    try:
        index = CocoIndex.load(instances)
        boxes = load_boxes(Path(store), index)
        for record in index.images.values():
            boxes.for_image(record)
    except Exception as error:
        code, text = describe(error)
        return code, f"error: {escape_unprintable(text)}", ""
    return 0, "", ""


def run(*words: str) -> tuple[int, str, str]:
    """Run a command; returns its exit code, its stderr, and the traceback if it crashes, else ""."""
    done = CliRunner().invoke(main, words)
    crashed = done.exception is not None and not isinstance(done.exception, SystemExit)
    return done.exit_code, done.stderr, "".join(traceback.format_exception(done.exception)) if crashed else ""


def check_in_fork(path: Path) -> str:
    """Like `hdf5_sandbox.check_in_subprocess`, but in a fork, which starts faster, and only once per file."""
    state = FileState.from_path(path)
    if state not in _results:
        _results[state] = _run_check_in_fork(path)
    return _results[state]


def _run_check_in_fork(path: Path) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            sys.stdout = os.fdopen(writer, "w")
            hdf5_sandbox.main(str(path), _MEMORY, hdf5_sandbox.CPU_SECONDS)
            sys.stdout.close()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:  # the child must not return, as it would continue in place of its parent
            os._exit(_CHECK_FAILED)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        output = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != _CHECK_FAILED, f"the check of {path} itself failed"
    return hdf5_sandbox._interpret_output(output, code, hdf5_sandbox.CPU_SECONDS)


def peak_memory() -> int:
    """Peak memory of this process in bytes; ru_maxrss would include that of its parent."""
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def run_and_measure(folder: Path, name: str, command: str, words: list[str]) -> dict[str, object]:
    """Run a command and return its result as a JSON object."""
    started = time.monotonic()
    code, stderr, crash, outside = 0, "", "", ""
    try:
        with restrict_file_access(folder, *map(Path, (os.environ["XDG_CACHE_HOME"], os.devnull, ZONEINFO)), forks=True):
            code, stderr, crash = (read_boxes if command == BOXES else run)(*words)
    except AssertionError as error:
        outside = str(error)
    return {
        "file": name, "command": command, "code": code, "seconds": time.monotonic() - started, "outside": outside,
        "stderr": stderr, "bytes": peak_memory(), "crash": crash,
    }  # fmt: skip


def main_loop(folder: Path) -> None:
    hdf5_access.check_in_subprocess = check_in_fork  # type: ignore[attr-defined]
    for line in sys.stdin:
        name = line.strip()
        out = folder / "out"
        for command, words in commands(folder, folder / name, out).items():
            print(json.dumps(run_and_measure(folder, name, command, words)), flush=True)
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main_loop(Path(sys.argv[1]))
