"""A small extraction without a detector, and a process that runs it with faults.

As a script, it reads a `Case` in JSON from each line of stdin, extracts in a forked child, and prints the result.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from store_examples import HEADER, PLAN, make_regions, record

from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.extraction import merge_reading
from refdet.extraction.pipeline import extract
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.store import StoreWriter
from refdet.store.shard_file import ShardWriter

RECORDS = [record(make_regions(i, 0)) for i in range(10)]
BATCHES = [RECORDS[7:10], RECORDS[0:2], RECORDS[5:7], RECORDS[2:5]]  # a shard each
BROKEN = 4  # id of an image that `load` cannot read
PUT_AT_ONCE = 3  # images that the merge writes with one call of `StoreWriter.put`

# Functions that change files while shards and the store are written. Removals succeed even if the disk is full.
STEPS: list[tuple[Any, str]] = [
    (os, "fsync"), (os, "replace"), (ShardWriter, "add"), (ShardWriter, "finish"), (StoreWriter, "put"),
    (StoreWriter, "finish"),
]  # fmt: skip
REMOVALS: list[tuple[Any, str]] = [(os, "unlink"), (os, "rmdir")]


@dataclass(frozen=True)
class Case:
    """An extraction and its faults.

    Attributes:
        out: the store.
        resume: whether to resume the extraction.
        kill: step at which the process is killed, counted from 0; None for never.
        after: whether it is killed after that step instead of before it.
        full: step from which on the disk is full, None for never.
        seconds: time after which the process is killed, None for never.
    """

    out: str
    resume: bool = False
    kill: int | None = None
    after: bool = False
    full: int | None = None
    seconds: float | None = None


def load(record: ImageRecord) -> np.ndarray:
    if record.id == BROKEN:
        raise InputError(f"{record.file_name}: not a readable image")
    return np.full((record.height, record.width, 3), record.id, np.uint8)


def compute(batch: list[ImageRecord], images: list[np.ndarray], slowly: float = 0.0) -> Finish:
    assert [int(image[0, 0, 0]) for image in images] == [r.id for r in batch]
    time.sleep(slowly)
    return lambda: [make_regions(r.id, 1 + r.id % 4) for r in batch]


def interrupt_at(batch: list[ImageRecord], compute: Callable[..., Finish] = compute) -> Callable[..., Finish]:
    """A `compute` that Ctrl-C interrupts at a batch."""

    def interrupted(current: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        if current == batch:
            raise KeyboardInterrupt
        return compute(current, images)

    return interrupted


def run(out: Path, resume: bool = False, compute: Callable[..., Finish] = compute) -> Summary:
    header = replace(HEADER, options=PLAN.options)
    return extract(out, PLAN, header, BATCHES, RECORDS, load, compute, resume, shard_images=2)


def environment(*folders: Path) -> dict[str, str]:
    """Environment of a process that can import the test helpers, and modules in other folders."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), *map(str, folders),
             os.environ.get("PYTHONPATH", "")]  # fmt: skip
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _watch(owner: Any, name: str, begin: Callable[[str], int], done: Callable[[int, str], None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if name in ("replace", "unlink") and str(args[-1]).startswith(os.environ["XDG_CACHE_HOME"]):
            return original(*args, **kwargs)  # not a step of the extraction
        step = begin(name)
        result = original(*args, **kwargs)
        done(step, str(args[1]) if name == "replace" else "")
        return result

    setattr(owner, name, watched)


def _disturb(case: Case, replaced: Path) -> list[str]:
    """Install the faults of a case; returns the list to which the steps are appended."""
    steps: list[str] = []

    def begin(name: str) -> int:
        step = len(steps)
        steps.append(name)
        if step == case.kill and not case.after:
            os.kill(os.getpid(), signal.SIGKILL)
        if case.full is not None and step >= case.full and name not in ("unlink", "rmdir"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return step

    def done(step: int, target: str) -> None:
        if target:
            replaced.write_text(target)
        if step == case.kill and case.after:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in [*STEPS, *REMOVALS]:
        _watch(owner, name, begin, done)
    if case.seconds is not None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, case.seconds)
    return steps


def _child(case: Case, answer: Path) -> None:
    from refdet.cli.main import describe

    out = Path(case.out)
    merge_reading._GROUP_IMAGES = PUT_AT_ONCE
    steps = _disturb(case, out.parent.with_suffix(".replaced"))
    slowly = functools.partial(compute, slowly=0.02 if case.seconds else 0.0)
    try:
        run(out, case.resume, slowly)
        code, text = 0, ""
    except Exception as error:
        code, text = describe(error)
    answer.write_text(json.dumps({"code": code, "text": text, "steps": steps}))


def serve() -> None:
    """Print for each case its exit code (-9 for SIGKILL), its error and, unless killed, its steps."""
    null = os.open(os.devnull, os.O_WRONLY)
    for line in sys.stdin:
        case = Case(**json.loads(line))
        answer = Path(case.out).parent.with_suffix(".answer")
        answer.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            os.dup2(null, 2)  # the progress bar
            try:
                _child(case, answer)
            finally:
                os._exit(0)
        _, status = os.waitpid(process, 0)
        died = {"code": os.waitstatus_to_exitcode(status), "text": "", "steps": []}
        print(answer.read_text() if answer.exists() else json.dumps(died), flush=True)


def line(case: Case) -> str:
    return json.dumps(asdict(case)) + "\n"


if __name__ == "__main__":
    serve()
