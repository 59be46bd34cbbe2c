"""Load a trained detector from its run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refdet.config.recipe import Recipe
from refdet.detector import optimize
from refdet.detector.checkpoint import MODEL, CheckpointMetadata, load_meta, read_tensors, run_directory
from refdet.detector.finite import LARGEST_WEIGHT, unusable
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import arithmetic, naming_out_of_memory
from refdet.errors import InputError, RuntimeFailure
from refdet.files.short_text import cut
from refdet.ops._library import warn_of_plain_pytorch

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COUNTER = "num_batches_tracked"
MOST_NUMBERS = 500_000_000  # parameters and buffers of a network; the largest published one has 80 million


@dataclass(frozen=True)
class TrainedDetector:
    """A detector, the metadata of its weights, its run directory, and the precision of `inference`."""

    model: MaskRCNN
    meta: CheckpointMetadata
    path: Path
    precision: str = "float32"

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Context manager in which `model` computes without gradients and in `precision`.

        Raises:
            torch.cuda.OutOfMemoryError: the GPU has too little memory, whichever library said so.
        """
        with torch.inference_mode(), arithmetic(self.precision), naming_out_of_memory():
            yield


def load(
    path: str | Path, device: str | torch.device = "cpu", for_inference: bool = False, precision: str = "float32"
) -> TrainedDetector:
    """Load the detector of a run directory, in eval mode and channels_last.

    Args:
        path: the run directory.
        device: device to load it to.
        for_inference: fuse and repack layers for inference; the state dict can no longer be loaded elsewhere.
        precision: "float32", "tf32" or "bfloat16"; the last implies `for_inference`.

    Raises:
        InputError: the checkpoint is missing or damaged, or its weights do not fit its recipe.
        RuntimeFailure: the device has too little memory.
    """
    folder, meta = run_directory(path), load_meta(path)
    return from_tensors(meta, read_tensors(folder / MODEL)[0], folder, device, for_inference, precision)


def from_tensors(
    meta: CheckpointMetadata,
    tensors: Mapping[str, Tensor],
    folder: Path,
    device: str | torch.device = "cpu",
    for_inference: bool = False,
    precision: str = "float32",
) -> TrainedDetector:
    """The detector that `load` would load had the tensors been saved in ``folder``; it gets copies of them."""
    model = without_memory(meta.recipe, len(meta.categories))
    load_weights(model, tensors, folder / MODEL, counters=True)
    bf16 = precision == "bfloat16"
    try:
        with naming_out_of_memory():
            model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            if for_inference or bf16:
                model = optimize.optimize_for_inference(model, bf16)
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeFailure(f"{device} has too little memory for the detector; free some of it") from error
    warn_of_plain_pytorch(next(model.parameters()).device)
    return TrainedDetector(model, meta, folder, precision)


def without_memory(recipe: Recipe, classes: int) -> MaskRCNN:
    """The network of a recipe on the meta device, without storage until `load_weights` is called.

    Raises:
        InputError: it has more than `MOST_NUMBERS` parameters and buffers.
    """
    with torch.device("meta"):
        model = MaskRCNN(recipe, classes)
    numbers = sum(value.numel() for value in model.state_dict().values())
    if numbers > MOST_NUMBERS:
        raise InputError(
            f"recipe {recipe.name}: {numbers / 1e9:.1f} billion numbers ({4 * numbers / 2**30:.0f} GiB) is more than "
            f"{MOST_NUMBERS / 1e9:g} billion; lower model.width and the other channel counts"
        )
    return model


def load_weights(
    model: MaskRCNN, tensors: Mapping[str, Tensor], source: Path, skip: tuple[str, ...] = (), counters: bool = False
) -> None:
    """Load all tensors into a model, except names that begin with one of `skip`.

    Args:
        model: the network; may be on the meta device if nothing is skipped, and then gets copies of the tensors.
        tensors: name -> tensor.
        source: the file of the tensors, for errors.
        skip: prefixes of the names to ignore.
        counters: load the batch counters of batch norms too.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or contains NaN, inf or implausible values.
    """
    own = model.state_dict()
    check_fit(own, tensors, source, skip)
    given = _compared(tensors, skip)
    bad = unusable(given)
    if bad:
        raise InputError(
            f"{source}: {cut(bad[0])} contains NaN, inf, values beyond {LARGEST_WEIGHT:g} or a negative variance "
            f"({len(bad)} such tensors): the file is damaged or training diverged; use another checkpoint"
        )
    empty = next(model.parameters()).is_meta
    if counters or empty:
        given |= {name: _counter(tensors.get(name)) for name in own if name.endswith(COUNTER)}
    if empty:  # copy: safetensors returns views of the memory-mapped file
        given = {name: value.to(own[name].dtype, copy=True) for name, value in given.items()}
    model.load_state_dict(given, strict=False, assign=empty)


def _counter(found: Tensor | None) -> Tensor:
    return torch.tensor(0) if found is None or found.shape or found.dtype != torch.int64 else found


def check_fit(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path, skip: tuple[str, ...] = ()
) -> None:
    """Check names, shapes and dtypes of tensors against a network, without reading their values.

    Args:
        own: state dict of the network.
        tensors: name -> tensor.
        source: the file of the tensors, for errors.
        skip: prefixes of the names to ignore.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not floating point.
    """
    own, given = _compared(own, skip), _compared(tensors, skip)
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{cut(name)} is not in this network" for name in given if name not in own]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, the recipe expects {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    wrong += [
        f"{name} is {given[name].dtype}, not floating point"
        for name in own
        if name in given and given[name].dtype not in REAL
    ]
    if wrong:
        raise InputError(
            f"{source}: the weights do not fit the recipe: {wrong[0]} ({len(wrong)} such); check that model.json and "
            "model.safetensors are from the same run"
        )


def _compared(tensors: Mapping[str, Tensor], skip: tuple[str, ...]) -> dict[str, Tensor]:
    # a batch norm has a counter, a frozen norm has not
    names = (name for name in tensors if not name.startswith(skip) and not name.endswith(COUNTER))
    return {name: tensors[name] for name in names}
