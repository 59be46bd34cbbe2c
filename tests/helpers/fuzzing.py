"""Changing files at random, and what must hold of the program that reads the result.

Each format is tried for REFDET_FUZZ_SECONDS seconds or REFDET_FUZZ_INPUTS inputs, by default a second; `make
test-hostile` gives it more. A run is the function of its seed alone, so that a finding can be repeated.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from refdet.errors import RefdetError
from refer import ReferError

SECONDS = float(os.environ.get("REFDET_FUZZ_SECONDS", "1"))
INPUTS = int(os.environ.get("REFDET_FUZZ_INPUTS", "1000000"))
LONGEST_MESSAGE = 2000

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -1e-300, float("nan"), float("inf"), "",
    "0", "000000000009.jpg", "../../../etc/passwd", "/dev/zero", "a\nb", "\x1b[31mproven: clean", "\x00", "\ud800",
    "\u202egpj.x", "=1+1", "<script>", "x" * 5000, "C:\\a\\b.jpg", "VG_100K/9.jpg", [], {}, [[]], [[[[]]]], {"": {}},
    [None] * 50, [1, 2, 3, 4], [1, 2, 3],
    [float("nan")] * 4, [1e308] * 4, [10**400] * 4, {"size": [1, 1], "counts": "1"},
    {"size": [2**31, 2**31], "counts": [2**62]}, {"size": [9, 9], "counts": "oooooooo"},
    {"size": [9, 9], "counts": [-1, 82]}, [[0, 0, 5, 0, 5, 5]], [[1e300, 0, 5, 0, 5, 5]], [[0, 0, 1e9, 1e9, 5, 5]],
    [[0, 0, 5]], [0, 0, 5, 0, 5, 5],
]  # fmt: skip


def changed_tree(tree: Any, chance: random.Random) -> Any:
    """A JSON value with one to three parts replaced, removed, doubled or put elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.randint(1, 3)):
        nodes = list(_nodes(tree))
        if not nodes:
            return copy.deepcopy(chance.choice(HOSTILE))
        parent, key = chance.choice(nodes)
        kind = chance.randrange(6)
        if kind <= 2:
            parent[key] = copy.deepcopy(chance.choice(HOSTILE))
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            other, place = chance.choice(nodes)
            with contextlib.suppress(KeyError, IndexError):
                parent[key] = copy.deepcopy(other[place])
    return tree


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to four of them flipped, or a part cut, doubled or overwritten."""
    for _ in range(chance.randint(1, 4)):
        if not data:
            return chance.randbytes(chance.randint(0, 20))
        at = chance.randrange(len(data))
        end = min(len(data), at + chance.choice((1, 2, 8, 64)))
        kind = chance.randrange(6)
        if kind <= 2:
            data = data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
        elif kind == 3:
            data = data[:at] + data[end:] if chance.random() < 0.7 else data[:at]
        elif kind == 4:
            data = data[:at] + data[at:end] * 2 + data[end:]
        else:
            data = data[:at] + chance.randbytes(end - at) + data[end:]
    return data


def fuzz(seed: int, change: Callable[[random.Random], None], work: Callable[[], object], allowed: Path) -> int:
    """Try inputs until the time is up; gives how many.

    Args:
        seed: of the first input.
        change: writes the input that a random generator makes.
        work: reads it; may raise what users are shown, and nothing else.
        allowed: the folder below which files may be opened, beside those of Python and its packages.
    """
    started, tried = time.perf_counter(), 0
    while tried < INPUTS and (time.perf_counter() - started < SECONDS or tried < 20):
        change(random.Random(seed + tried))
        before = time.perf_counter()
        try:
            with watched(allowed):
                work()
        except (RefdetError, ReferError) as error:
            check_message(str(error), seed + tried)
        except BaseException as error:
            raise AssertionError(f"input {seed + tried}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - before < 20, f"input {seed + tried} took too long"
        tried += 1
    return tried


def check_message(text: str, number: int) -> None:
    """An error is one line of bearable length."""
    assert text and len(text) < LONGEST_MESSAGE and "\n" not in text, f"input {number}: {text[:300]!r}"


_watching: list[Path] = []
_seen: list[str] = []
_OPENS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.symlink", "shutil.rmtree")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind")
_OF_PYTHON = [Path(path).resolve() for path in (sys.prefix, sys.base_prefix, *sys.path) if path]


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or (event not in _OPENS and event not in _STARTS):
        return
    if event in _STARTS:
        _seen.append(f"{event} {args!r:.200}")
        return
    if args and isinstance(args[0], str | bytes | os.PathLike):
        path = Path(os.path.realpath(os.fsdecode(args[0])))
        if not any(path.is_relative_to(folder) for folder in (*_watching, *_OF_PYTHON)):
            _seen.append(f"{event} {path}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(allowed: Path) -> Iterator[None]:
    """Fail if a file outside a folder is opened meanwhile, or a process started."""
    _watching.append(allowed.resolve())
    _seen.clear()
    try:
        yield
    finally:
        _watching.pop()
        seen = [*_seen]
    assert not seen, seen


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each part of a JSON value, as what holds it and its key or position."""
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        items = parent.items() if isinstance(parent, dict) else enumerate(parent) if isinstance(parent, list) else ()
        for key, inner in items:
            yield parent, key
            if isinstance(inner, dict | list):
                waiting.append(inner)
