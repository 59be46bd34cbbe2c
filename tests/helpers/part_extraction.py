"""The extraction of `interrupted_extraction` in parts, in this process or in a child process that may be killed.

As a script, `part_extraction.py STORE K/N [KILL]` computes a part. KILL is when it receives SIGKILL: "compute 2", at
its second batch; "add 3", at its third write to a shard; "put 4", at the fourth image of the merge.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from interrupted_extraction import BATCHES, RECORDS, compute, environment, load
from store_examples import HEADER, PLAN

from refdet.data.coco import ImageRecord
from refdet.extraction.part import Part
from refdet.extraction.parts import extract_part
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.store import StoreWriter
from refdet.store.shard_file import ShardWriter

SHARDS = len(BATCHES)


def cut(size: int) -> Sequence[list[ImageRecord]]:
    """The batches of `interrupted_extraction`, or smaller ones."""
    if size == PLAN.batch_size:
        return BATCHES
    return [batch[start : start + size] for batch in BATCHES for start in range(0, len(batch), size)]


def run_part(out: Path, part: str, **changes: Any) -> Summary:
    arguments: dict[str, Any] = {"plan": PLAN, "compute": compute, "load": load, "shard_images": 2, **changes}
    arguments.setdefault("header", replace(HEADER, options=arguments["plan"].options))
    return extract_part(out, make_batches=cut, records=RECORDS, part=Part.parse(part), **arguments)


def start_part(out: Path, part: str, *kill: str) -> subprocess.Popen[str]:
    """Start a child process that computes a part."""
    command = [sys.executable, __file__, str(out), part, *kill]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output of a process, which must end within a minute."""
    output, errors = process.communicate(timeout=60)
    return process.returncode, output + errors


def _kill_at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            time.sleep(0.05)  # for the thread that writes earlier results
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return counted


def main(out: str, part: str, kill: str = "") -> None:
    what, _, number = kill.partition(" ")
    computing: Callable[[list[ImageRecord], list[np.ndarray]], Finish] = compute
    if what == "compute":
        computing = _kill_at_call(int(number), compute)
    elif what:
        owner: Any = {"add": ShardWriter, "put": StoreWriter}[what]
        setattr(owner, what, _kill_at_call(int(number), getattr(owner, what)))
    print(run_part(Path(out), part, compute=computing).merged)


if __name__ == "__main__":
    main(*sys.argv[1:])
