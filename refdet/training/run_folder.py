"""Which folders training may write: new and empty ones, and runs of its own that go on. No torch."""

from __future__ import annotations

from pathlib import Path

from refdet.errors import InputError

LOCK = ".refdet-train.lock"  # made before anything else, so that a folder that has it is ours
BUSY = "let it end or choose another --out"
LARGEST_LOG = 2**28  # bytes of metrics.jsonl; a line for each 20 steps of the longest training takes a twentieth
_STATE, _META = "state", "model.json"


def states(out: Path) -> list[Path]:
    """The states in a run directory, oldest first."""
    found = (path for path in (out / _STATE).glob("step-*.safetensors") if path.stem[len("step-") :].isdecimal())
    return sorted(found, key=lambda path: int(path.stem[len("step-") :]))


def goes_on(out: Path, resume: bool) -> tuple[bool, str]:
    """Whether there is a state to go on from, and what to say where ``--resume`` finds none.

    Raises:
        InputError: ``out`` is there without `resume`, or is no folder, or no run directory.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder for the run directory")
    if not out.exists() or not any(out.iterdir()):
        return False, f"--resume: nothing to resume in {out}: starting from the beginning" if resume else ""
    if not resume:
        raise InputError(f"--out {out} exists; choose another, remove it, or go on with it by --resume")
    if states(out):
        return True, ""
    if (out / _META).exists():
        raise InputError(f"--resume: {out} holds weights but no training state to resume from; choose another --out")
    if not (out / LOCK).exists():
        strange = min(path.name for path in out.iterdir())
        raise InputError(f"--resume: {out} holds {strange}, but no run of refdet train; choose another --out")
    return False, f"--resume: the run in {out} ended before its first save: starting from the beginning"
