"""Change files at random, and check the program that reads the result.

Each format is tried with REFDET_FUZZ_INPUTS inputs or, as in `make test-hostile`, for REFDET_FUZZ_SECONDS seconds; by
default with a fixed number of inputs, the same on every machine. An input is a function of its seed alone, which a
failure names: REFDET_FUZZ_SEED=71 REFDET_FUZZ_INPUTS=1 tries the input of seed 71 again.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import refdet
from refdet.errors import RefdetError
from refer import ReferError

SECONDS = float(os.environ.get("REFDET_FUZZ_SECONDS") or 0)
INPUTS = int(os.environ.get("REFDET_FUZZ_INPUTS") or 0)  # 0 for the default of the format
FIRST_SEED = int(os.environ.get("REFDET_FUZZ_SEED") or 0)
MAX_MESSAGE_LENGTH = 1000
MAX_SECONDS = 20  # of one input
MAX_MEMORY = 2**31  # bytes that an input may take in addition to the process's own
MIN_INPUTS_TO_PASS = 100  # number of inputs from which some must be read without an error

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
    """Copy a JSON value and replace, remove, repeat or move one to three of its parts."""
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
    """Apply one to four changes to bytes: flip a bit, or remove, repeat or overwrite a part."""
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


def seeds(least: int = 40) -> Iterator[int]:
    """The seeds of the inputs of one format: at least `least`, and more while there is time."""
    started, tried = time.monotonic(), 0
    while tried < INPUTS if INPUTS else tried < least or time.monotonic() - started < SECONDS:
        yield FIRST_SEED + tried
        tried += 1


def fuzz(
    change: Callable[[random.Random], object],
    work: Callable[[], object],
    allowed: Path,
    least: int = 40,
    passes: bool = True,
) -> None:
    """Try the inputs of one format.

    Args:
        change: writes a random input.
        work: reads it; may only raise errors that are shown to users.
        allowed: the folder below which files may be opened, besides those of Python and its packages.
        least: minimum number of inputs, as in `seeds`.
        passes: whether some of the inputs must be read without an error; otherwise none may be.
    """
    tried = passed = 0
    started = time.monotonic()
    for seed in seeds(least):
        change(random.Random(seed))
        try:
            with limited(), watched(allowed):
                work()
            passed += 1
        except (RefdetError, ReferError) as error:
            check_message(str(error), seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        tried += 1
    print(f"{tried} inputs in {time.monotonic() - started:.0f} s, {passed} read without an error")
    assert (passed > 0) == passes or (passes and tried < MIN_INPUTS_TO_PASS)


def check_message(text: str, seed: int) -> None:
    """Assert that an error is one short line that names no Python class, except in parentheses."""
    assert text and len(text) < MAX_MESSAGE_LENGTH and "\n" not in text, f"seed {seed}: {text[:300]!r}"
    assert "Error" not in text.partition(" (")[0], f"seed {seed}: {text}"


class TooMuch(BaseException):
    """An input takes more time or memory than it may."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Fail if the block takes longer than `MAX_SECONDS`, or more memory than `MAX_MEMORY`."""

    def late(number: int, frame: object) -> None:
        raise TooMuch(f"more than {MAX_SECONDS} s")

    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if taken > MAX_MEMORY:
            raise TooMuch(f"{taken} bytes of memory")


_watching: list[Path] = []
_forks: list[bool] = []
_seen: list[str] = []
_OPENS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.symlink",
          "os.link", "os.truncate", "os.chmod", "os.rmdir", "shutil.rmtree")  # fmt: skip
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind")
_OWN = (sys.prefix, sys.base_prefix, *sys.path, str(Path(refdet.__file__).parent))  # readable by any test
_OF_PYTHON = [Path(path).resolve() for path in _OWN if path]


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or (event not in _OPENS and event not in _STARTS):
        return
    if event in _STARTS:
        if event != "os.fork" or not _forks:
            _seen.append(f"{event} {args!r:.200}")
        return
    if args and isinstance(args[0], str | bytes | os.PathLike):
        path = Path(os.path.realpath(os.path.join(_folder_of(event, args), os.fsdecode(args[0]))))
        allowed = _watching if _writes(event, args) and path.parent.name != "__pycache__" else [*_watching, *_OF_PYTHON]
        if not any(path.is_relative_to(folder) for folder in allowed):
            _seen.append(f"{event} {path} {args[1:]}")


def _folder_of(event: str, args: tuple[Any, ...]) -> str:
    """The folder that a path of an event is relative to: an open one, or the current one."""
    descriptor = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
    return os.readlink(f"/proc/self/fd/{descriptor}") if descriptor > -1 else ""


def _writes(event: str, args: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    return event not in ("os.listdir", "os.scandir")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(*allowed: Path, forks: bool = False) -> Iterator[None]:
    """Fail if the block opens a file outside of folders, or starts a process, except for forks with `forks`."""
    _watching.extend(folder.resolve() for folder in allowed)
    _seen.clear()
    if forks:
        _forks.append(True)
    try:
        yield
    finally:
        _watching.clear()
        _forks.clear()
        seen = [*_seen]
        assert not seen, seen


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over the parts of a JSON value, each as its parent and its key or position in it."""
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        items = parent.items() if isinstance(parent, dict) else enumerate(parent) if isinstance(parent, list) else ()
        for key, inner in items:
            yield parent, key
            if isinstance(inner, dict | list):
                waiting.append(inner)
