"""Damaged and hostile stores through the commands: one line and exit code 0, 1 or 2, whatever is in them.

Some dozens of inputs by default; REFDET_FUZZ_SECONDS sets a time instead, REFDET_FUZZ_SEED where it begins.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from hostile_stores import STRUCTURES, repeat_text, share_bytes, write_store

INPUTS = 24
LIMIT_SECONDS = 20
LIMIT_BYTES = 2 << 30
PREPARED = 40  # inputs that one process takes

# Runs each command on each file as the command line does, and prints what came of it; says which files it opened.
RUN = """
import json, os, re, shutil, sys, time, traceback
from pathlib import Path
from click.testing import CliRunner
from refdet.cli.main import main
from refdet.store import hdf5_door
from refdet.store import hdf5_structure
from refdet.store import hdf5_trial
import refdet.splits.inspect, refdet.store.export.npz, refdet.store.export.mattnet, refdet.store.verify
import pandas, h5py._hl.filters

def most_memory():
    "Not ru_maxrss, which begins with that of the process that started this one."
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def forked(path):
    "As the process that the door starts, without the time that Python takes to begin."
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = os.fdopen(writer, "w")
        hdf5_trial.main(str(path), 4 << 30, hdf5_trial.SECONDS)
        sys.stdout.close()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        output = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return hdf5_trial.verdict(output, code, hdf5_trial.SECONDS)

hdf5_door.try_file = forked
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.path.abspath(os.fsdecode(arguments[0])))
sys.addaudithook(hook)
own = (sys.prefix, sys.base_prefix, refdet.__path__[0], os.environ["XDG_CACHE_HOME"],
       *sys.path)
own = tuple(map(os.path.realpath, own))
folder = Path(sys.argv[1])
for line in sys.stdin:
    name = line.strip()
    path = folder / name
    for number, words in enumerate((["inspect"], ["inspect", "--verify"], ["export", "--format", "npz"],
                                    ["export", "--format", "mattnet"])):
        out = folder / "out" / f"{name}-{number}"
        more = ["--features", str(path), "--out", str(out)] if words[0] == "export" else [str(path)]
        opened.clear()
        start = time.monotonic()
        done = CliRunner().invoke(main, [*words, *more])
        seconds = time.monotonic() - start
        outside = [one for one in opened if not one.startswith((str(folder), *own, "/proc", "/dev/null", "/usr"))]
        print(json.dumps({
            "file": name, "command": " ".join(words), "code": done.exit_code, "seconds": seconds, "outside": outside,
            "stderr": done.stderr, "crash": "" if done.exception is None or isinstance(done.exception, SystemExit) else
            "".join(traceback.format_exception(done.exception)),
            "bytes": most_memory(),
        }), flush=True)
        shutil.rmtree(out, ignore_errors=True)
"""


def _damage(content: bytes, random_: random.Random) -> bytes:
    """Some bytes changed, cut, put in or repeated."""
    data = bytearray(content)
    for _ in range(random_.choice([1, 1, 1, 2, 4, 16])):
        place = random_.randrange(len(data))
        kind = random_.randrange(8)
        if kind < 3:
            data[place] ^= 1 << random_.randrange(8)
        elif kind < 6:
            data[place] = random_.choice([0, 1, 127, 128, 255])
        elif kind == 6:
            data[place : place + 8] = random_.randbytes(8)
        else:
            other = random_.randrange(len(data))
            data[place : place + 32] = data[other : other + 32]
    return bytes(data[: random_.randrange(len(data))] if random_.randrange(20) == 0 else data)


def _inputs(folder: Path, seed: int) -> Iterator[str]:
    """Write one store after the other, and give their names."""
    sound = {
        (compression, libver): write_store(folder / "sound.h5", compression, libver).read_bytes()
        for compression in ("none", "gzip", "lzf")
        for libver in ("", "earliest", "latest")
    }
    (folder / "sound.h5").unlink()
    number = seed
    while True:
        random_ = random.Random(number)
        path = folder / f"{number}.h5"
        path.write_bytes(sound[random_.choice(sorted(sound))])
        kind = random_.randrange(6)
        if kind == 0:
            name = random_.choice(sorted(STRUCTURES))
            with h5py.File(path, "r+") as file:
                STRUCTURES[name][0](file)
        elif kind == 1 and random_.randrange(2):
            random_.choice([repeat_text, share_bytes])(path)
        if kind > 1 or random_.randrange(2):
            path.write_bytes(_damage(path.read_bytes(), random_))
        yield path.name
        number += 1


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _check(found: dict) -> None:
    what = f"{found['file']}: {found['command']}: {found}"
    assert found["code"] in (0, 1, 2) and not found["crash"], what
    lines = found["stderr"].strip().splitlines()
    assert found["code"] == 0 or (lines and lines[-1].startswith("error: ")), what
    assert not any(word in found["stderr"] for word in ("unexpected", "Traceback")), what
    assert sum(line.startswith("error: ") for line in lines) == (found["code"] != 0), what
    assert all(line.isprintable() for line in lines), what
    assert found["seconds"] < LIMIT_SECONDS and found["bytes"] < LIMIT_BYTES and not found["outside"], what


def test_no_input_crashes_hangs_or_leaves_the_folder(tmp_path: Path) -> None:
    budget = float(os.environ.get("REFDET_FUZZ_SECONDS", 0))
    names = _inputs(tmp_path, int(os.environ.get("REFDET_FUZZ_SEED", 0)))
    end, done = time.monotonic() + budget, 0
    while done < INPUTS or time.monotonic() < end:
        batch = [next(names) for _ in range(INPUTS if not budget else PREPARED)]
        command = [sys.executable, "-c", RUN, str(tmp_path)]
        child = subprocess.run(command, input="\n".join(batch), capture_output=True, text=True, preexec_fn=_limited)
        results = [json.loads(line) for line in child.stdout.splitlines()]
        for found in results:
            _check(found)
        last = results[-1]["file"] if results else "the first"
        assert child.returncode == 0, f"ended with {child.returncode} after {last}: {child.stderr[-2000:]}"
        assert len(results) == 4 * len(batch)
        done += len(batch)
        for name in batch:
            (tmp_path / name).unlink()


def test_the_check_can_fail() -> None:
    sound = {"file": "a", "command": "inspect", "code": 2, "crash": "", "stderr": "error: a.h5: damaged\n",
             "seconds": 1.0, "bytes": 1, "outside": []}  # fmt: skip
    _check(sound)
    for wrong in (
        {"code": 139}, {"crash": "x"}, {"stderr": ""}, {"stderr": "error: unexpected KeyError"}, {"seconds": 21.0},
        {"stderr": "error: x\nerror: y"}, {"stderr": "\x1b[2J\nerror: y"},
        {"bytes": 1 << 32}, {"outside": ["/etc/passwd"]},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            _check(sound | wrong)
