"""Which folders training may write: new and empty ones, and runs of its own that go on. No torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from refdet.errors import InputError

log = logging.getLogger(__name__)

LOCK = ".refdet-train.lock"  # made before anything else, so that a folder that has it is ours
BUSY = "let it end or choose another --out"
_STATE, _META = "state", "model.json"


def states(out: Path) -> list[Path]:
    """The states in a run directory, oldest first."""
    found = (path for path in (out / _STATE).glob("step-*.safetensors") if path.stem[len("step-") :].isdecimal())
    return sorted(found, key=lambda path: int(path.stem[len("step-") :]))


def goes_on(out: Path, resume: bool) -> bool:
    """Whether there is a state to go on from; if not, training starts from the beginning, with a note on ``--resume``.

    Raises:
        InputError: ``out`` is there without `resume`, or is no folder, or no run directory, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder for the run directory")
    _check_writable(out)
    if not out.exists() or not any(out.iterdir()):
        if resume:
            log.warning("note: --resume: there is nothing in %s to resume: starting from the beginning", out)
        return False
    if not resume:
        raise InputError(f"--out {out} exists; choose another, remove it, or go on with it by --resume")
    if states(out):
        return True
    if (out / _META).exists():
        raise InputError(f"--resume: {out} holds weights but no {_STATE}/ to go on from; choose another --out")
    if not (out / LOCK).exists():
        strange = min(path.name for path in out.iterdir())
        raise InputError(f"--resume: {out} holds {strange}, but no run of refdet train; choose another --out")
    log.warning("note: --resume: the run in %s ended before its first save: starting from the beginning", out)
    return False


def _check_writable(out: Path) -> None:
    there = out
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"--out {out}: {there} is a file, no folder can be made in it; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: {there} cannot be written; choose another --out")
