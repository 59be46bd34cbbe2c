"""Commands on damaged and hostile stores: exit code 0, 1 or 2, with one error line unless it is 0."""

from __future__ import annotations

import collections
import itertools
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import fuzz_store_commands
import h5py
import pytest
from evaluate_examples import write_refer
from fuzz_store_commands import REFER, commands
from fuzzing import seeds
from hostile_stores import STRUCTURES, repeat_text, share_bytes, write_store
from interrupted_extraction import environment

pytestmark = pytest.mark.slow

INPUTS = 24
LIMIT_SECONDS = 20
LIMIT_BYTES = 2 << 30
MAX_BATCH = 200  # inputs of one process
SIZE = (9, 7)  # height and width of the images of the stores
OBJECTS = [
    {"image_id": 10, "bbox": [1, 1, 3, 4], "category_id": 1, "split": "val"},
    {"image_id": 11, "bbox": [2, 2, 3, 3], "category_id": 1, "split": "train"},
    {"image_id": 12, "bbox": [0, 0, 5, 5], "category_id": 2, "split": "testA"},
]


def _damage(content: bytes, rng: random.Random) -> bytes:
    """Change, overwrite or repeat some bytes, and sometimes cut the end off."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(len(data))
        kind = rng.randrange(8)
        if kind < 3:
            data[place] ^= 1 << rng.randrange(8)
        elif kind < 6:
            data[place] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 6:
            data[place : place + 8] = rng.randbytes(8)
        else:
            other = rng.randrange(len(data))
            data[place : place + 32] = data[other : other + 32]
    return bytes(data[: rng.randrange(len(data))] if rng.randrange(20) == 0 else data)


def _undamaged_stores(folder: Path) -> list[bytes]:
    """Stores of each layout and compression, of detections and of annotations."""
    path = folder / "undamaged.h5"
    stores = [
        write_store(path, compression, libver, ann_ids).read_bytes()
        for compression in ("none", "gzip", "lzf")
        for libver in ("", "earliest", "latest")
        for ann_ids in (True, False)
    ]
    path.unlink()
    return stores


def _write_input(path: Path, stores: list[bytes], seed: int) -> None:
    """Write one of the stores with a hostile structure, damage, or both."""
    rng = random.Random(seed)
    path.write_bytes(rng.choice(stores))
    kind = rng.randrange(6)
    if kind == 0:
        name = rng.choice(sorted(STRUCTURES))
        with h5py.File(path, "r+") as file:
            STRUCTURES[name][0](file)
    elif kind == 1 and rng.randrange(2):
        rng.choice([repeat_text, share_bytes])(path)
    if kind > 1 or rng.randrange(2):
        path.write_bytes(_damage(path.read_bytes(), rng))


def _disable_core_dumps() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _check(result: dict) -> None:
    message = f"{result['file']}: {result['command']}: {result}"
    assert result["code"] in (0, 1, 2) and not result["crash"], message
    lines = result["stderr"].strip().splitlines()
    assert result["code"] == 0 or (lines and lines[-1].startswith("error: ")), message
    assert not any(word in result["stderr"] for word in ("unexpected", "Traceback")), message
    assert sum(line.startswith("error: ") for line in lines) == (result["code"] != 0), message
    assert all(line.isprintable() for line in lines), message
    assert result["seconds"] < LIMIT_SECONDS and result["bytes"] < LIMIT_BYTES and not result["outside"], message


def test_no_store_makes_a_command_crash_hang_or_access_other_files(tmp_path: Path) -> None:
    stores, started = _undamaged_stores(tmp_path), time.monotonic()
    write_refer(tmp_path / REFER, OBJECTS, size=SIZE)
    numbers, codes = seeds(INPUTS), collections.Counter()
    while batch := [f"{seed}.h5" for seed in itertools.islice(numbers, MAX_BATCH)]:
        for name in batch:
            _write_input(tmp_path / name, stores, int(Path(name).stem))
        command = [sys.executable, fuzz_store_commands.__file__, str(tmp_path)]
        child = subprocess.run(command, input="\n".join(batch), capture_output=True, text=True, env=environment(),
                               preexec_fn=_disable_core_dumps)  # fmt: skip
        results = [json.loads(line) for line in child.stdout.splitlines()]
        for result in results:
            _check(result)
            codes[result["command"], result["code"]] += 1
        last = results[-1]["file"] if results else "the first"
        assert child.returncode == 0, f"ended with {child.returncode} after {last}: {child.stderr[-2000:]}"
        assert len(results) == len(batch) * len(commands(tmp_path, tmp_path, tmp_path))
        for name in batch:
            (tmp_path / name).unlink()
    print(f"{sum(codes.values())} commands in {time.monotonic() - started:.0f} s, exit codes {dict(codes)}")


def test_the_check_of_results_can_fail() -> None:
    correct = {"file": "a", "command": "inspect", "code": 2, "crash": "", "stderr": "error: a.h5: damaged\n",
             "seconds": 1.0, "bytes": 1, "outside": ""}  # fmt: skip
    _check(correct)
    for wrong in (
        {"code": 139}, {"crash": "x"}, {"stderr": ""}, {"stderr": "error: unexpected KeyError"}, {"seconds": 21.0},
        {"stderr": "error: x\nerror: y"}, {"stderr": "\x1b[2J\nerror: y"},
        {"bytes": 1 << 32}, {"outside": "open /etc/passwd"},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            _check(correct | wrong)
