"""Load a trained detector from its run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from refdet.config.recipe import Recipe
from refdet.detector import optimize
from refdet.detector.checkpoint import MODEL, CheckpointMetadata, load_meta, read_weights, run_directory
from refdet.detector.finite import MAX_WEIGHT, find_unusable
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import as_out_of_memory_error, float32_arithmetic
from refdet.errors import InputError, RuntimeFailure
from refdet.files.short_text import format_count, shorten
from refdet.ops._library import warn_without_cuda_kernels

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BATCH_COUNTER = "num_batches_tracked"  # buffer that BatchNorm2d has and frozen norms do not
MAX_VALUES = 500_000_000  # limit of the parameters and buffers of a network; the largest published one has 80 million


@dataclass(frozen=True)
class TrainedDetector:
    """A network with trained weights, their metadata, the run directory, and the precision of `inference`."""

    model: MaskRCNN
    meta: CheckpointMetadata
    path: Path
    precision: str = "float32"

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Context manager in which `model` computes without gradients and in `precision`.

        Raises:
            torch.cuda.OutOfMemoryError: the GPU has too little memory, whichever library reports it.
        """
        with torch.inference_mode(), float32_arithmetic(self.precision), as_out_of_memory_error():
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
    return from_tensors(meta, read_weights(folder, meta), folder, device, for_inference, precision)


def from_tensors(
    meta: CheckpointMetadata,
    tensors: Mapping[str, Tensor],
    folder: Path,
    device: str | torch.device = "cpu",
    for_inference: bool = False,
    precision: str = "float32",
) -> TrainedDetector:
    """Build a detector from copies of tensors, as `load` does from those in a run directory.

    Args:
        meta: metadata of the weights.
        tensors: name -> tensor.
        folder: the run directory, for `TrainedDetector.path` and errors.
        device: as in `load`.
        for_inference: as in `load`.
        precision: as in `load`.

    Raises:
        InputError: the tensors do not fit the recipe, or contain unusable values.
        RuntimeFailure: the device has too little memory.
    """
    model = build_on_meta(meta.recipe, len(meta.categories))
    load_weights(model, tensors, folder / MODEL, counters=True)
    bf16 = precision == "bfloat16"
    try:
        with as_out_of_memory_error():
            model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            if for_inference or bf16:
                model = optimize.optimize_for_inference(model, bf16=bf16)
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeFailure(f"{device} has too little memory for the detector; free some of it") from error
    warn_without_cuda_kernels(next(model.parameters()).device)
    return TrainedDetector(model, meta, folder, precision)


class _SkipInit(TorchFunctionMode):
    """Skips the initialization of weights, for which, on the meta device, torch would import its compiler: a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_on_meta(recipe: Recipe, classes: int) -> MaskRCNN:
    """The network of a recipe on the meta device, without storage until `load_weights` is called.

    Raises:
        InputError: the network's parameters and buffers have more than `MAX_VALUES` values.
    """
    with torch.device("meta"), _SkipInit():
        model = MaskRCNN(recipe, classes)
    values = sum(value.numel() for value in model.state_dict().values())
    if values > MAX_VALUES:
        raise InputError(
            f"recipe {recipe.name}: a network of {values / 1e9:.1f} billion parameters ({4 * values / 2**30:.0f} GiB), "
            f"more than {MAX_VALUES / 1e9:g} billion; lower model.width and the other channel counts"
        )
    return model


def load_weights(
    model: MaskRCNN, tensors: Mapping[str, Tensor], source: Path, skip: tuple[str, ...] = (), counters: bool = False
) -> None:
    """Load tensors into a model, except those whose names start with one of `skip`.

    Args:
        model: the network. If it is on the meta device, nothing may be skipped, and it gets copies of the tensors.
        tensors: name -> tensor.
        source: the file of the tensors, for errors.
        skip: prefixes of the names to ignore.
        counters: also load `BATCH_COUNTER` of batch norms.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or contains NaN, inf or implausible values.
    """
    model_state = model.state_dict()
    check_compatible(model_state, tensors, source, skip)
    selected = _select_comparable(tensors, skip)
    unusable_names = find_unusable(selected)
    if unusable_names:
        raise InputError(
            f"{source}: {shorten(unusable_names[0])} contains NaN, inf, values beyond {MAX_WEIGHT:g} or a negative "
            f"variance ({format_count(len(unusable_names), 'such tensor')}): the file is damaged or training diverged; "
            "use another checkpoint"
        )
    on_meta = next(model.parameters()).is_meta
    if counters or on_meta:
        selected |= {name: _valid_counter(tensors.get(name)) for name in model_state if name.endswith(BATCH_COUNTER)}
    if on_meta:  # copy: safetensors returns views of the memory-mapped file
        selected = {name: value.to(model_state[name].dtype, copy=True) for name, value in selected.items()}
    model.load_state_dict(selected, strict=False, assign=on_meta)


def _valid_counter(counter: Tensor | None) -> Tensor:
    """The value of a `BATCH_COUNTER`, or 0 if it is missing or not an int64 scalar."""
    return torch.tensor(0) if counter is None or counter.shape or counter.dtype != torch.int64 else counter


def check_compatible(
    model_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path, skip: tuple[str, ...] = ()
) -> None:
    """Check names, shapes and dtypes of tensors against a network, without reading their values.

    Args:
        model_state: state dict of the network.
        tensors: name -> tensor.
        source: the file of the tensors, for errors.
        skip: prefixes of the names to ignore.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not floating point.
    """
    model_state, loaded = _select_comparable(model_state, skip), _select_comparable(tensors, skip)
    problems = [f"{name} is missing" for name in model_state if name not in loaded]
    problems += [f"{shorten(name)} is not in this network" for name in loaded if name not in model_state]
    problems += [
        f"{name} is {tuple(loaded[name].shape)}, the recipe expects {tuple(value.shape)}"
        for name, value in model_state.items()
        if name in loaded and loaded[name].shape != value.shape
    ]
    problems += [
        f"{name} is {loaded[name].dtype}, not floating point"
        for name in model_state
        if name in loaded and loaded[name].dtype not in FLOAT_DTYPES
    ]
    if problems:
        raise InputError(
            f"{source}: the weights do not fit the recipe: {problems[0]} ({format_count(len(problems), 'problem')} in "
            "all); check that model.json and model.safetensors are from the same run"
        )


def _select_comparable(tensors: Mapping[str, Tensor], skip: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors without the skipped ones and without batch counters, which frozen norms do not have."""
    names = (name for name in tensors if not name.startswith(skip) and not name.endswith(BATCH_COUNTER))
    return {name: tensors[name] for name in names}
