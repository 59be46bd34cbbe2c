"""The folder ``best/`` of a run directory: the weights with the highest rate so far, themselves a run directory."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from refdet.detector import checkpoint
from refdet.detector.checkpoint import BEST, VALIDATION, CheckpointMetadata, HasStateDict
from refdet.errors import InputError
from refdet.files.atomic import TEMPORARY_MARK, find_temporary_files, fsync, write_json
from refdet.files.json_files import read_bytes
from refdet.files.short_text import short_repr
from refdet.files.small_files import strict_json
from refdet.training.run_card import write_card

_MAX_BYTES = 2**16  # bytes of a validation.json
_PREVIOUS = f".{BEST}.00000000.{TEMPORARY_MARK}"  # the folder that is being replaced


@dataclass(frozen=True)
class ValidationRecord:
    """What ``validation.json`` says of the weights beside it.

    Attributes:
        metric: the rate they were chosen by.
        value: that rate, 0..1.
        step: of the weights.
        instances: name of the instances file they were validated on.
        images: number of its images.
        data_sha256: of its contents, so that rates of other data are not compared.
        rates: all rates of the validation.
    """

    metric: str
    value: float
    step: int
    instances: str
    images: int
    data_sha256: str
    rates: Mapping[str, float]


def read_best(out: Path) -> ValidationRecord | None:
    """What is known of the best weights of a run; None if there are none yet.

    Raises:
        InputError: ``validation.json`` is damaged.
    """
    path = out / BEST / VALIDATION
    if not path.exists():
        return None
    try:
        tree = strict_json(read_bytes(path, _MAX_BYTES))
        types = {"metric": str, "value": float, "step": int, "instances": str, "images": int, "data_sha256": str,
                 "rates": dict}  # fmt: skip
        for name, expected in types.items():
            value = tree.get(name) if isinstance(tree, dict) else tree
            if type(value) is not expected:
                raise InputError(f"{name}: {expected.__name__} is needed, not {short_repr(value)}")
        return ValidationRecord(**{name: tree[name] for name in types})
    except InputError as error:
        raise InputError(
            f"{path}: damaged ({error}); remove the folder {BEST}: the best of the next validations will be kept"
        ) from None


def write_best(
    out: Path, weights: HasStateDict, meta: CheckpointMetadata, record: ValidationRecord, validated_on: str
) -> None:
    """Replace ``best/``; a process that is killed leaves the folder before or after, which `recover` finds."""
    new, old, best = out / f".{BEST}.{secrets.token_hex(4)}.{TEMPORARY_MARK}", out / _PREVIOUS, out / BEST
    try:
        checkpoint.save(new, weights, meta)
        write_json(new / VALIDATION, asdict(record))
        write_card(new, meta, [{"step": record.step, **record.rates}], validated_on)
        if best.exists():
            os.replace(best, old)
        os.replace(new, best)
        fsync(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Undo what a process left that was killed while it replaced ``best/``."""
    if (out / _PREVIOUS).exists() and not (out / BEST).exists():
        os.replace(out / _PREVIOUS, out / BEST)
    for folder in find_temporary_files(out, BEST):
        shutil.rmtree(folder)
