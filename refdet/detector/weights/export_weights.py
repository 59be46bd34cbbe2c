"""Export a detector's weights as a state dict of detectron2 or torchvision."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from refdet.config.recipe import ModelOptions, Recipe
from refdet.detector import checkpoint
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.detector.loading import build_on_meta, check_compatible
from refdet.detector.weights import detectron2, torchvision
from refdet.detector.weights.detectron2_config import detectron2_config
from refdet.errors import ArgumentError, InputError
from refdet.files.atomic import atomic_create

FORMATS = ("detectron2", "torchvision")
# format -> value of input.resize and of model.mask_pasting with which refdet does what that program does
_RESIZE = {"detectron2": "pillow", "torchvision": "torchvision"}
_MASK_PASTING = {"detectron2": "padded", "torchvision": "torchvision"}


@dataclass(frozen=True)
class ExportedWeights:
    """Result of an export.

    Attributes:
        files: the files written.
        tensors: number of tensors.
        notes: how the other program's results will differ, one line each.
    """

    files: tuple[Path, ...]
    tensors: int
    notes: tuple[str, ...]


def export_weights(run: Path, out: Path, format: str) -> ExportedWeights:
    """Export the weights of a run directory.

    Args:
        run: the run directory.
        out: the ``.pth`` to write. For detectron2, a configuration is written next to it as ``.yaml``.
        format: "detectron2" or "torchvision".

    Raises:
        ArgumentError: unknown format, or `out` exists.
        InputError: there is no checkpoint, or the other program has no such network.
    """
    if format not in FORMATS:
        raise ArgumentError("format", f"must be one of {', '.join(FORMATS)}, not {format!r}")
    files: tuple[Path, ...] = (out, out.with_suffix(".yaml")) if format == "detectron2" else (out,)
    if len(set(files)) < len(files):
        raise ArgumentError("out", f"{out}: is also the name of the configuration written next to it; give a .pth")
    for file in files:
        if os.path.lexists(file):
            raise ArgumentError("out", f"{file} exists; choose another or remove it")
    folder, meta = checkpoint.run_directory(run), checkpoint.load_meta(run)
    recipe, classes = meta.recipe, len(meta.categories)
    _reject_unsupported(run, meta, format)
    tensors = checkpoint.read_weights(folder, meta)
    check_compatible(build_on_meta(recipe, classes).state_dict(), tensors, folder / checkpoint.MODEL)
    tensors = {name: value.float() for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    if format == "detectron2":
        state_dict = detectron2.name_mapping(recipe).export(tensors)
    else:
        state_dict = torchvision.name_mapping(recipe).export(_shift_anchors(recipe, tensors))
        if recipe.model.box_convs:
            state_dict = torchvision.unfold_norms(state_dict)
    state_dict = {name: value.contiguous() for name, value in state_dict.items()}
    if format == "detectron2":
        metadata = {"categories": list(meta.categories), "trained_on": meta.provenance.one_line()}
        _write(out, lambda path: torch.save({"model": state_dict, "refdet": metadata}, path))
        _write(files[1], lambda path: path.write_text(yaml.safe_dump(detectron2_config(recipe, classes))))
    else:
        _write(out, lambda path: torch.save(state_dict, path))
    return ExportedWeights(files, len(state_dict), _notes(meta, format))


def _reject_unsupported(run: Path, meta: CheckpointMetadata, format: str) -> None:
    """Raise InputError for a network that the other program cannot build."""
    model, recipe = meta.recipe.model, meta.recipe
    if meta.untrained:
        raise InputError(f"{run}: {', '.join(meta.untrained)} are not trained; train it first")
    unsupported = [] if model.backbone == "resnet" else [f"model.backbone={model.backbone}"]
    if format == "torchvision" and model.neck != "fpn":
        unsupported.append(f"model.neck={model.neck}")
    if model.width != 64:
        unsupported.append(f"model.width={model.width}")
    unsupported += [name for name in ("legacy_plus_one", "legacy_rounded_anchors") if getattr(model, name)]
    if model.pooling not in ("align", "align_legacy"):
        unsupported.append(f"model.pooling={model.pooling}")
    if model.neck == "c4" and (model.pooler_resolution != 14 or model.stride != 16):
        unsupported.append(f"model.pooler_resolution={model.pooler_resolution} at stride {model.stride}")
    if format == "detectron2" and model.box_convs:
        unsupported.append(f"model.box_convs={model.box_convs}")
    if format == "detectron2" and model.rpn_convs > 1:
        unsupported.append(f"model.rpn_convs={model.rpn_convs}")
    if format == "torchvision" and (model.box_convs, model.box_fcs) not in ((0, 2), (4, 1)):
        unsupported.append(f"model.box_convs={model.box_convs} with model.box_fcs={model.box_fcs}")
    if format == "torchvision" and recipe.input.order != "rgb":
        unsupported.append("input.order=bgr")
    if format == "detectron2" and model.torchvision_anchors:
        unsupported.append("model.torchvision_anchors")
    if format == "detectron2" and model.neck == "c4" and model.depth < 50:
        unsupported.append(f"model.depth={model.depth} and model.neck=c4")
    if format == "torchvision" and model.depth >= 50 and model.stride_in_1x1:
        unsupported.append("model.stride_in_1x1")
    if unsupported:
        raise InputError(f"{run}: {format} has no network with {', '.join(unsupported)}")


def _notes(meta: CheckpointMetadata, format: str) -> tuple[str, ...]:
    """How the other program's results will differ."""
    recipe, model, notes = meta.recipe, meta.recipe.model, []
    if recipe.input.resize != _RESIZE[format]:
        notes.append(f"{format} resizes images differently from input.resize={recipe.input.resize}")
    if model.masks and model.mask_pasting != _MASK_PASTING[format]:
        notes.append(f"{format} pastes masks differently within half a cell of the edges of their boxes")
    padding, format_padding = max(recipe.input.size_divisibility, 1), 32 if model.neck == "fpn" else 1
    if padding != format_padding:
        notes.append(f"{format} pads images to multiples of {format_padding} pixels, this network of {padding}")
    ids = [id_ for id_, _ in meta.categories]
    if format == "detectron2":
        if ids != sorted(ids):
            notes.append(
                "detectron2 sorts the categories of a dataset by id, but labels are in the order of "
                "['refdet']['categories'] in the file; set thing_classes to that order"
            )
        return tuple(notes)
    if ids != list(range(1, len(ids) + 1)):
        notes.append("label i of torchvision is category i of refdet inspect, counted from 1, not a category id")
    if model.pooling == "align":
        notes.append(
            "torchvision pools half a cell off from where this network was trained to pool, which costs accuracy"
        )
    if not model.torchvision_anchors:
        notes.append("torchvision rounds the corners of anchors, changing them by less than half a pixel")
    if arguments := _torchvision_arguments(recipe):
        values = ", ".join(f"{name}={value}" for name, value in arguments.items())
        notes.append(f"build torchvision's {'Mask' if model.masks else 'Faster'} R-CNN with {values}")
    return tuple(notes)


def _torchvision_arguments(recipe: Recipe) -> dict[str, str]:
    """Arguments of torchvision's MaskRCNN and FasterRCNN as Python code, where they differ from the defaults."""
    model, inputs, proposals, defaults = recipe.model, recipe.input, recipe.proposals, ModelOptions()
    values_and_defaults = {
        "min_size": (inputs.min_sizes[-1], 800),
        "max_size": (inputs.max_size, 1333),
        "image_mean": ([round(value / 255, 6) for value in inputs.mean], [0.485, 0.456, 0.406]),
        "image_std": ([round(value / 255, 6) for value in inputs.std], [0.229, 0.224, 0.225]),
        "rpn_pre_nms_top_n_test": (proposals.pre_nms_top_n_test, 1000),
        "rpn_post_nms_top_n_test": (proposals.post_nms_top_n_test, 1000),
        "rpn_nms_thresh": (proposals.nms_threshold, 0.7),
    }
    arguments = {name: repr(value) for name, (value, default) in values_and_defaults.items() if value != default}
    if (model.anchor_sizes, model.anchor_ratios) != (defaults.anchor_sizes, defaults.anchor_ratios):
        sizes = tuple((size,) for size in model.anchor_sizes)
        arguments["rpn_anchor_generator"] = f"AnchorGenerator({sizes}, ({model.anchor_ratios},) * {len(sizes)})"
    if model.sampling_ratio != defaults.sampling_ratio:
        output_sizes = {"box_roi_pool": 7, "mask_roi_pool": 14} if model.masks else {"box_roi_pool": 7}
        for name, size in output_sizes.items():
            arguments[name] = f"MultiScaleRoIAlign(['0', '1', '2', '3'], {size}, {model.sampling_ratio})"
    return arguments


def _shift_anchors(recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adjust the RPN's deltas for torchvision's anchors, which have no `model.anchor_offset`.

    Raises:
        InputError: the anchors of the levels would need different adjustments.
    """
    model = recipe.model
    if not model.anchor_offset:
        return tensors
    strides = (4, 8, 16, 32, 64)  # of the levels of the pyramid
    strides_per_size = [stride / size for stride, size in zip(strides, model.anchor_sizes, strict=True)]
    if max(strides_per_size) - min(strides_per_size) > 1e-6:
        raise InputError(
            "model.anchor_offset: torchvision's anchors have none, and it can be moved into the deltas only if each of "
            "model.anchor_sizes is the same multiple of its stride"
        )
    shift = model.anchor_offset * strides_per_size[0]  # offset / side of a square anchor
    roots = [ratio**0.5 for ratio in model.anchor_ratios]
    shifts = torch.tensor([[shift * root, shift / root, 0.0, 0.0] for root in roots])  # dx dy dw dh of each ratio
    return {**tensors, "rpn.delta.bias": tensors["rpn.delta.bias"] + shifts.flatten()}


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file that becomes `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_create(path) as temporary:
        write(Path(temporary))
