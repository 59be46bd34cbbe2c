"""The folder ``best/`` of a run directory: the weights with the highest AP so far, itself a run directory."""

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
from refdet.files.strict_json import strict_json
from refdet.training.run_card import write_card

_MAX_BYTES = 2**16  # of validation.json
# temporary name of the folder being replaced, always the same so that `recover_best` finds it
_PREVIOUS = f".{BEST}.00000000.{TEMPORARY_MARK}"


@dataclass(frozen=True)
class ValidationRecord:
    """Contents of ``validation.json``: the validation of the weights in the same folder.

    Attributes:
        metric: name of the metric by which the weights were selected.
        value: value of that metric, 0..1.
        step: training step of the weights.
        instances: name of the instances file that the weights were validated on.
        images: number of images in that file.
        data_sha256: hash of the validation data, so that values on different data are not compared.
        rates: name -> value of all metrics of the validation.
    """

    metric: str
    value: float
    step: int
    instances: str
    images: int
    data_sha256: str
    rates: Mapping[str, float]


def read_best(out: Path) -> ValidationRecord | None:
    """Read the validation of a run's best weights; None if no weights were validated yet.

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
    """Replace ``best/``; if the process is killed meanwhile, `recover_best` completes or undoes this.

    Args:
        out: the run directory.
        weights: the new best weights.
        meta: metadata of the weights.
        record: validation of the weights.
        validated_on: the validation data, as in `write_card`.
    """
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
        shutil.rmtree(new, ignore_errors=True)  # after an error; otherwise it was renamed
    shutil.rmtree(old, ignore_errors=True)


def recover_best(out: Path) -> None:
    """Clean up after a process that was killed in `write_best`; ``best/`` is then the previous or the new folder."""
    if (out / _PREVIOUS).exists() and not (out / BEST).exists():
        os.replace(out / _PREVIOUS, out / BEST)
    for folder in find_temporary_files(out, BEST):
        shutil.rmtree(folder)
