"""The state that a training resumes from, as it stands in ``state/step-*.safetensors``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from refdet.checkpoint import Meta, read_tensors
from refdet.detector.finite import unusable
from refdet.errors import InputError
from refdet.short_text import cut, shown
from refdet.small_files import strict_json


@dataclass(frozen=True)
class TrainingState:
    """What a state file holds.

    Attributes:
        meta: of the run, with the steps that are done.
        fresh: beginnings of the names of what began anew where the run started from weights; None from nothing.
        weights: the state of the model.
        momentum: of the parameters that have some.
    """

    meta: Meta
    fresh: tuple[str, ...] | None
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]


def read_state(path: Path) -> TrainingState:
    """Read a state file.

    Raises:
        InputError: it is damaged, or no state.
    """
    tensors, metadata = read_tensors(path)
    try:
        if "meta" not in metadata:
            raise InputError("its metadata has no 'meta'")
        meta, fresh = Meta.parse(metadata["meta"]), strict_json(metadata.get("fresh", "null"))
        if fresh is not None and not (isinstance(fresh, list) and all(isinstance(part, str) for part in fresh)):
            raise InputError(f"fresh: a list of names is needed, not {shown(fresh)}")
    except InputError as error:
        raise InputError(f"{path}: not the state of a run ({error})") from None
    return TrainingState(
        meta, None if fresh is None else tuple(fresh), _part(tensors, "model/"), _part(tensors, "momentum/")
    )


def check_momentum(model: nn.Module, momentum: dict[str, Tensor], source: Path) -> None:
    """Check the momentum of a state against the parameters of the model.

    Raises:
        InputError: it is of no parameter, of another shape, or holds NaN or inf.
    """
    shapes = {name: value.shape for name, value in model.named_parameters()}
    wrong = [name for name, value in momentum.items() if shapes.get(name) != value.shape]
    wrong = wrong or unusable(momentum, math.inf)
    if wrong:
        raise InputError(f"{source}: the momentum of {cut(wrong[0])} is not of this network, or holds NaN or inf "
                         f"({len(wrong)} such); the state is damaged: start anew in another --out")  # fmt: skip


def _part(tensors: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    return {name.removeprefix(beginning): value for name, value in tensors.items() if name.startswith(beginning)}
