"""The output folder of a training run: whether it is new, empty, or a run to resume, and its lock. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refdet.detector.checkpoint import META, STATE
from refdet.errors import InputError
from refdet.files.lock import exclusive_lock

LOCK = ".refdet-train.lock"  # created first, so that its presence marks a run directory
IN_USE_FIX = "wait for it to finish or choose another `out`"  # the fix if another process holds the lock
MAX_LOG_BYTES = 2**28  # of metrics.jsonl; the longest run writes a twentieth of this


def state_paths(out: Path) -> list[Path]:
    """Paths of the states in a run directory, oldest first."""
    paths = (path for path in (out / STATE).glob("step-*.safetensors") if path.stem[len("step-") :].isdecimal())
    return sorted(paths, key=lambda path: int(path.stem[len("step-") :]))


def can_resume(out: Path, resume: bool) -> tuple[bool, str]:
    """Whether there is a state to resume from, and a note for the user if there is none although `resume` was given.

    Raises:
        InputError: `out` is not a folder; it is not empty and `resume` was not given; or it is not a run directory that
            can be resumed.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"`out` {out}: is a file; give a folder for the run directory")
    if not out.exists() or not any(out.iterdir()):
        return False, f"`resume`: nothing to resume in {out}: starting from the beginning" if resume else ""
    if not resume:
        raise InputError(f"`out` {out} exists; choose another, remove it, or continue it with `resume=True`")
    if state_paths(out):
        return True, ""
    if (out / META).exists():
        raise InputError(f"`resume`: {out} holds weights but no training state to resume from; choose another `out`")
    if not (out / LOCK).exists():
        unexpected = min(path.name for path in out.iterdir())
        raise InputError(f"`resume`: {out} holds {unexpected} but is not a run of refdet train; choose another `out`")
    return False, f"`resume`: the run in {out} ended before its first save: starting from the beginning"


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Context manager that creates the run directory and locks it."""
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out, LOCK, IN_USE_FIX):
        yield


def concurrent_write_error(out: Path) -> InputError:
    """The error if the run directory changed since it was checked."""
    return InputError(f"{out}: another process has just written to this folder; run the command again")
