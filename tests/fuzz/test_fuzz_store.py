"""Damaged and hostile stores through the commands: one line and exit code 0, 1 or 2, whatever is in them."""

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
PREPARED = 200  # inputs that one process takes at most
SIZE = (9, 7)  # height and width of the images of the stores
OBJECTS = [
    {"image_id": 10, "bbox": [1, 1, 3, 4], "category_id": 1, "split": "val"},
    {"image_id": 11, "bbox": [2, 2, 3, 3], "category_id": 1, "split": "train"},
    {"image_id": 12, "bbox": [0, 0, 5, 5], "category_id": 2, "split": "testA"},
]


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


def _sound(folder: Path) -> list[bytes]:
    """Stores of each layout and compression, of detections and of annotations."""
    path = folder / "sound.h5"
    found = [
        write_store(path, compression, libver, ann_ids).read_bytes()
        for compression in ("none", "gzip", "lzf")
        for libver in ("", "earliest", "latest")
        for ann_ids in (True, False)
    ]
    path.unlink()
    return found


def _write_input(path: Path, sound: list[bytes], seed: int) -> None:
    chance = random.Random(seed)
    path.write_bytes(chance.choice(sound))
    kind = chance.randrange(6)
    if kind == 0:
        name = chance.choice(sorted(STRUCTURES))
        with h5py.File(path, "r+") as file:
            STRUCTURES[name][0](file)
    elif kind == 1 and chance.randrange(2):
        chance.choice([repeat_text, share_bytes])(path)
    if kind > 1 or chance.randrange(2):
        path.write_bytes(_damage(path.read_bytes(), chance))


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
    sound, started = _sound(tmp_path), time.monotonic()
    write_refer(tmp_path / REFER, OBJECTS, size=SIZE)
    numbers, codes = seeds(INPUTS), collections.Counter()
    while batch := [f"{seed}.h5" for seed in itertools.islice(numbers, PREPARED)]:
        for name in batch:
            _write_input(tmp_path / name, sound, int(Path(name).stem))
        command = [sys.executable, fuzz_store_commands.__file__, str(tmp_path)]
        child = subprocess.run(command, input="\n".join(batch), capture_output=True, text=True, env=environment(),
                               preexec_fn=_limited)  # fmt: skip
        results = [json.loads(line) for line in child.stdout.splitlines()]
        for found in results:
            _check(found)
            codes[found["command"], found["code"]] += 1
        last = results[-1]["file"] if results else "the first"
        assert child.returncode == 0, f"ended with {child.returncode} after {last}: {child.stderr[-2000:]}"
        assert len(results) == len(batch) * len(commands(tmp_path, tmp_path, tmp_path))
        for name in batch:
            (tmp_path / name).unlink()
    print(f"{sum(codes.values())} commands in {time.monotonic() - started:.0f} s, exit codes {dict(codes)}")


def test_the_check_can_fail() -> None:
    sound = {"file": "a", "command": "inspect", "code": 2, "crash": "", "stderr": "error: a.h5: damaged\n",
             "seconds": 1.0, "bytes": 1, "outside": ""}  # fmt: skip
    _check(sound)
    for wrong in (
        {"code": 139}, {"crash": "x"}, {"stderr": ""}, {"stderr": "error: unexpected KeyError"}, {"seconds": 21.0},
        {"stderr": "error: x\nerror: y"}, {"stderr": "\x1b[2J\nerror: y"},
        {"bytes": 1 << 32}, {"outside": "open /etc/passwd"},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            _check(sound | wrong)
