"""Which folders training may write: new and empty ones, and runs of its own that go on. No torch."""

from __future__ import annotations

import logging
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
        InputError: ``out`` is there without `resume`, or is no folder, or no run directory.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder for the run directory")
    if not out.exists() or not any(out.iterdir()):
        if resume:
            log.warning("note: --resume: nothing to resume in %s: starting from the beginning", out)
        return False
    if not resume:
        raise InputError(f"--out {out} exists; choose another, remove it, or go on with it by --resume")
    if states(out):
        return True
    if (out / _META).exists():
        raise InputError(f"--resume: {out} holds weights but no training state to resume from; choose another --out")
    if not (out / LOCK).exists():
        strange = min(path.name for path in out.iterdir())
        raise InputError(f"--resume: {out} holds {strange}, but no run of refdet train; choose another --out")
    log.warning("note: --resume: the run in %s ended before its first save: starting from the beginning", out)
    return False
