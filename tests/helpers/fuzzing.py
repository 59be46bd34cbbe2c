"""Damage files at random, and check that reading them succeeds or raises a one-line error.

Each format is tried with a fixed number of inputs, with REFDET_FUZZ_INPUTS inputs or, as in `make test-hostile`, for
REFDET_FUZZ_SECONDS seconds. An input depends only on its seed, which a failure shows:
REFDET_FUZZ_SEED=71 REFDET_FUZZ_INPUTS=1 tries the input of seed 71 again.
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
MAX_MEMORY = 2**31  # bytes by which an input may raise the peak memory of the process

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


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Copy a JSON value and replace, remove, repeat or move one to three of its parts."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        nodes = list(_nodes(tree))
        if not nodes:
            return copy.deepcopy(rng.choice(HOSTILE))
        parent, key = rng.choice(nodes)
        kind = rng.randrange(6)
        if kind <= 2:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            other_parent, other_key = rng.choice(nodes)
            with contextlib.suppress(KeyError, IndexError):
                parent[key] = copy.deepcopy(other_parent[other_key])
    return tree


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Apply one to four changes to bytes: flip a bit, or remove, repeat or overwrite a part."""
    for _ in range(rng.randint(1, 4)):
        if not data:
            return rng.randbytes(rng.randint(0, 20))
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice((1, 2, 8, 64)))
        kind = rng.randrange(6)
        if kind <= 2:
            data = data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 :]
        elif kind == 3:
            data = data[:start] + data[end:] if rng.random() < 0.7 else data[:start]
        elif kind == 4:
            data = data[:start] + data[start:end] * 2 + data[end:]
        else:
            data = data[:start] + rng.randbytes(end - start) + data[end:]
    return data


def seeds(min_inputs: int = 40) -> Iterator[int]:
    """The seeds of the inputs of one format: `INPUTS`, or else at least `min_inputs` within `SECONDS`."""
    started, tried = time.monotonic(), 0
    while tried < INPUTS if INPUTS else tried < min_inputs or time.monotonic() - started < SECONDS:
        yield FIRST_SEED + tried
        tried += 1


def fuzz(
    change: Callable[[random.Random], object],
    work: Callable[[], object],
    allowed: Path,
    min_inputs: int = 40,
    passes: bool = True,
) -> None:
    """Try the inputs of one format.

    Args:
        change: writes a random input.
        work: reads it; may only raise RefdetError and ReferError.
        allowed: the folder below which files may be opened, besides those of Python and its packages.
        min_inputs: minimum number of inputs, as in `seeds`.
        passes: whether some of at least `min_inputs` inputs must be read without an error; otherwise none may be.
    """
    tried = passed = 0
    started = time.monotonic()
    for seed in seeds(min_inputs):
        change(random.Random(seed))
        try:
            with limit_resources(), restrict_file_access(allowed):
                work()
            passed += 1
        except (RefdetError, ReferError) as error:
            check_message(str(error), seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        tried += 1
    print(f"{tried} inputs in {time.monotonic() - started:.0f} s, {passed} read without an error")
    if not passes:
        assert passed == 0
    elif tried >= min_inputs:
        assert passed > 0


def check_message(text: str, seed: int) -> None:
    """Assert that an error is one short line that names no Python class, except in parentheses."""
    assert text and len(text) < MAX_MESSAGE_LENGTH and "\n" not in text, f"seed {seed}: {text[:300]!r}"
    assert "Error" not in text.partition(" (")[0], f"seed {seed}: {text}"


class LimitExceeded(BaseException):
    """An input takes too much time or memory."""


@contextlib.contextmanager
def limit_resources() -> Iterator[None]:
    """Fail if the block takes longer than `MAX_SECONDS`, or more memory than `MAX_MEMORY`."""

    def time_out(number: int, frame: object) -> None:
        raise LimitExceeded(f"more than {MAX_SECONDS} s")

    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, time_out)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if used > MAX_MEMORY:
            raise LimitExceeded(f"{used} bytes of memory")


# the state of `restrict_file_access`, which the audit hook reads
_watching: list[Path] = []
_forks: list[bool] = []
_violations: list[str] = []
_OPENS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.symlink",
          "os.link", "os.truncate", "os.chmod", "os.rmdir", "shutil.rmtree")  # fmt: skip
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind")
_PYTHON_PATHS = (sys.prefix, sys.base_prefix, *sys.path, str(Path(refdet.__file__).parent))  # readable by any test
_PYTHON_FOLDERS = [Path(path).resolve() for path in _PYTHON_PATHS if path]


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or (event not in _OPENS and event not in _STARTS):
        return
    if event in _STARTS:
        if event != "os.fork" or not _forks:
            _violations.append(f"{event} {args!r:.200}")
        return
    if args and isinstance(args[0], str | bytes | os.PathLike):
        path = Path(os.path.realpath(os.path.join(_folder_of(event, args), os.fsdecode(args[0]))))
        allowed = (
            _watching if _writes(event, args) and path.parent.name != "__pycache__" else [*_watching, *_PYTHON_FOLDERS]
        )
        if not any(path.is_relative_to(folder) for folder in allowed):
            _violations.append(f"{event} {path} {args[1:]}")


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
def restrict_file_access(*allowed: Path, forks: bool = False) -> Iterator[None]:
    """Fail if the block opens a file outside the allowed folders, connects to a socket or starts a process.

    Args:
        allowed: the folders; those of Python and its packages may be read as well.
        forks: whether the block may fork.
    """
    _watching.extend(folder.resolve() for folder in allowed)
    _violations.clear()
    if forks:
        _forks.append(True)
    try:
        yield
    finally:
        _watching.clear()
        _forks.clear()
        violations = [*_violations]
        assert not violations, violations


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
