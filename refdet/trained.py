"""A trained detector: the network that a run directory holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refdet.checkpoint import MODEL, Meta, load_meta, read_tensors, run_directory
from refdet.detector import folding
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import InputError


@dataclass(frozen=True)
class TrainedDetector:
    """A detector, what its weights mean, and the run directory they are from."""

    model: MaskRCNN
    meta: Meta
    path: Path


def load(
    path: str | Path, device: str | torch.device = "cpu", for_use: bool = False, bf16: bool = False
) -> TrainedDetector:
    """The detector of a run directory, in eval mode, channels_last.

    Args:
        for_use: make it as fast as it can be, the same within rounding; its weights then have other names.
        bf16: in bfloat16, for use alone; see `refdet.detector.folding`.

    Raises:
        InputError: no checkpoint, a damaged one, or weights that do not fit its recipe.
    """
    folder, meta = run_directory(path), load_meta(path)
    model = MaskRCNN(meta.recipe, len(meta.categories))
    load_weights(model, read_tensors(folder / MODEL)[0], folder / MODEL)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if for_use or bf16:
        model = folding.for_use(model, bf16)
    return TrainedDetector(model, meta, folder)


def load_weights(model: MaskRCNN, tensors: Mapping[str, Tensor], source: Path, skip: tuple[str, ...] = ()) -> None:
    """Put tensors into a model, all of them, but for names that begin with one of `skip`.

    Raises:
        InputError: a tensor is missing, left over, or of another shape.
    """
    own, given = _compared(model.state_dict(), skip), _compared(tensors, skip)
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} is not of this network" for name in given if name not in own]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, the recipe wants {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    if wrong:
        raise InputError(
            f"{source}: the weights do not fit the recipe: {wrong[0]} ({len(wrong)} such); are model.json and "
            "model.safetensors of different runs?"
        )
    model.load_state_dict(given, strict=False)


def _compared(tensors: Mapping[str, Tensor], skip: tuple[str, ...]) -> dict[str, Tensor]:
    # a frozen norm and a batch norm differ by a counter alone
    names = (name for name in tensors if not name.startswith(skip) and not name.endswith("num_batches_tracked"))
    return {name: tensors[name] for name in names}
