"""A trained detector: the network that a run directory holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refdet.config.recipe import Recipe
from refdet.detector import optimize
from refdet.detector.checkpoint import MODEL, CheckpointMetadata, load_meta, read_tensors, run_directory
from refdet.detector.finite import LARGEST_WEIGHT, unusable
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import InputError
from refdet.files.short_text import cut

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COUNTER = "num_batches_tracked"
MOST_NUMBERS = 500_000_000  # of a network; the largest of the published ones has 80 million


@dataclass(frozen=True)
class TrainedDetector:
    """A detector, what its weights mean, and the run directory they are from."""

    model: MaskRCNN
    meta: CheckpointMetadata
    path: Path


def load(
    path: str | Path, device: str | torch.device = "cpu", for_inference: bool = False, bf16: bool = False
) -> TrainedDetector:
    """The detector of a run directory, in eval mode, channels_last.

    Args:
        for_inference: make it as fast as it can be, the same within rounding; its weights then have other names.
        bf16: in bfloat16, for use alone; see `refdet.detector.optimize`.

    Raises:
        InputError: no checkpoint, a damaged one, or weights that do not fit its recipe.
    """
    folder, meta = run_directory(path), load_meta(path)
    tensors = read_tensors(folder / MODEL)[0]
    model = without_memory(meta.recipe, len(meta.categories))
    load_weights(model, tensors, folder / MODEL, counters=True)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if for_inference or bf16:
        model = optimize.optimize_for_inference(model, bf16)
    return TrainedDetector(model, meta, folder)


def without_memory(recipe: Recipe, classes: int) -> MaskRCNN:
    """The network of a recipe on torch's device "meta": it has shapes alone, until `load_weights` gives it numbers.

    Raises:
        InputError: it has more than `MOST_NUMBERS`.
    """
    with torch.device("meta"):
        model = MaskRCNN(recipe, classes)
    numbers = sum(value.numel() for value in model.state_dict().values())
    if numbers > MOST_NUMBERS:
        raise InputError(
            f"recipe {recipe.name}: a network of {numbers / 1e9:.1f} billion numbers ({4 * numbers / 2**30:.0f} GiB); "
            f"lower model.width and the other numbers of channels (at most {MOST_NUMBERS / 1e9:g} billion)"
        )
    return model


def load_weights(
    model: MaskRCNN, tensors: Mapping[str, Tensor], source: Path, skip: tuple[str, ...] = (), counters: bool = False
) -> None:
    """Put tensors into a model, all of them, but for names that begin with one of `skip`.

    Args:
        model: may be `without_memory`, if nothing is skipped; it then takes copies of the tensors as they are.
        counters: batch norms' counts of batches too, where the tensors have them.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or holds NaN, inf or absurd values.
    """
    own = model.state_dict()
    check_fit(own, tensors, source, skip)
    given = _compared(tensors, skip)
    bad = unusable(given)
    if bad:
        raise InputError(
            f"{source}: {cut(bad[0])} holds NaN, inf, values beyond {LARGEST_WEIGHT:g} or a negative variance "
            f"({len(bad)} such tensors); the weights are damaged or their training diverged: give another checkpoint"
        )
    empty = next(model.parameters()).is_meta
    if counters or empty:
        given |= {name: _counter(tensors.get(name)) for name in own if name.endswith(COUNTER)}
    if empty:  # a copy, as what safetensors gives is a part of its file
        given = {name: value.to(own[name].dtype, copy=True) for name, value in given.items()}
    model.load_state_dict(given, strict=False, assign=empty)


def _counter(found: Tensor | None) -> Tensor:
    return torch.tensor(0) if found is None or found.shape or found.dtype != torch.int64 else found


def check_fit(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path, skip: tuple[str, ...] = ()
) -> None:
    """Compare names, shapes and kinds of tensors with those of a network; no number is read.

    Args:
        own: the network's state.
        skip: beginnings of names that do not count.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or of integers where reals are needed.
    """
    own, given = _compared(own, skip), _compared(tensors, skip)
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{cut(name)} is not of this network" for name in given if name not in own]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, the recipe wants {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    wrong += [
        f"{name} is of {given[name].dtype}, not of real numbers"
        for name in own
        if name in given and given[name].dtype not in REAL
    ]
    if wrong:
        raise InputError(
            f"{source}: the weights do not fit the recipe: {wrong[0]} ({len(wrong)} such); are model.json and "
            "model.safetensors of different runs?"
        )


def _compared(tensors: Mapping[str, Tensor], skip: tuple[str, ...]) -> dict[str, Tensor]:
    # a frozen norm and a batch norm differ by a counter alone
    names = (name for name in tensors if not name.startswith(skip) and not name.endswith(COUNTER))
    return {name: tensors[name] for name in names}
