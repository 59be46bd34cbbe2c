"""Export a detector's weights as a state dict of detectron2 or torchvision."""

from __future__ import annotations

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
from refdet.errors import ArgumentError, InputError
from refdet.files.atomic import atomic_write

FORMATS = ("detectron2", "torchvision")
_RESIZE = {"pillow": "detectron2", "torchvision": "torchvision"}  # input.resize -> the program that resizes this way


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
    if len({*files}) < len(files):
        raise ArgumentError("out", f"{out}: is also the name of the configuration written next to it; give a .pth")
    for file in files:
        if file.exists():
            raise ArgumentError("out", f"{file} exists; choose another or remove it")
    folder, meta = checkpoint.run_directory(run), checkpoint.load_meta(run)
    _check(run, meta, format)
    tensors = checkpoint.read_weights(folder, meta)
    check_compatible(build_on_meta(meta.recipe, len(meta.categories)).state_dict(), tensors, folder / checkpoint.MODEL)
    tensors = {name: value.float() for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    if format == "detectron2":
        state = detectron2.name_mapping(meta.recipe).export(tensors)
        about = {"categories": list(meta.categories), "trained_on": meta.provenance.one_line()}
        tree: Any = {"model": state, "refdet": about}
        notes = _notes(meta.recipe, format)
    else:
        state = torchvision.name_mapping(meta.recipe).export(_shift_anchors(meta.recipe, tensors))
        state = torchvision.unfold_norms(state) if meta.recipe.model.box_convs else state
        tree, notes = state, _notes(meta.recipe, format)
    contiguous = {name: value.contiguous() for name, value in state.items()}
    tree = contiguous if tree is state else {**tree, "model": contiguous}
    _write(out, lambda path: torch.save(tree, path))
    if format == "detectron2":
        _write(files[1], lambda path: path.write_text(yaml.safe_dump(config(meta.recipe, len(meta.categories)))))
    return ExportedWeights(files, len(state), notes)


def config(recipe: Recipe, classes: int) -> dict[str, Any]:
    """detectron2's configuration of a network, to be merged into its defaults."""
    model, proposals, input_options = recipe.model, recipe.proposals, recipe.input
    pyramid, c4 = model.neck == "fpn", model.neck == "c4"
    maps = {"fpn": ["p2", "p3", "p4", "p5", "p6"], "c4": ["res4"], "dc5": ["res5"]}[model.neck]
    pooler = {
        "POOLER_RESOLUTION": model.pooler_resolution,
        "POOLER_SAMPLING_RATIO": model.sampling_ratio,
        "POOLER_TYPE": "ROIAlignV2" if model.pooling == "align" else "ROIAlign",
    }
    box = {**pooler, "NAME": "" if c4 else "FastRCNNConvFCHead", "NUM_FC": 0 if c4 else model.box_fcs}
    mask = {**pooler, "POOLER_RESOLUTION": 14, "NUM_CONV": 0 if c4 else 4, "NAME": "MaskRCNNConvUpsampleHead"}
    sizes = [[size] for size in model.anchor_sizes] if pyramid else [list(model.anchor_sizes)]
    stages = ["res2", "res3", "res4", "res5"]
    resnets = {
        "DEPTH": model.depth,
        "STRIDE_IN_1X1": model.stride_in_1x1,
        "NORM": "FrozenBN",
        "OUT_FEATURES": stages if pyramid else maps,
        "RES5_DILATION": 2 if model.neck == "dc5" else 1,
    }
    if model.depth < 50:
        resnets["RES2_OUT_CHANNELS"] = 64
    model_config: dict[str, Any] = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "MASK_ON": model.masks,
        "PIXEL_MEAN": list(input_options.mean),
        "PIXEL_STD": list(input_options.std),
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone" if pyramid else "build_resnet_backbone"},
        "RESNETS": resnets,
        "ANCHOR_GENERATOR": {
            "SIZES": sizes,
            "ASPECT_RATIOS": [list(model.anchor_ratios)],
            "OFFSET": model.anchor_offset,
        },
        "RPN": {
            "IN_FEATURES": maps,
            "CONV_DIMS": [model.rpn_channels] * model.rpn_convs,
            "NMS_THRESH": proposals.nms_threshold,
            "PRE_NMS_TOPK_TRAIN": proposals.pre_nms_top_n_train,
            "PRE_NMS_TOPK_TEST": proposals.pre_nms_top_n_test,
            "POST_NMS_TOPK_TRAIN": proposals.post_nms_top_n_train,
            "POST_NMS_TOPK_TEST": proposals.post_nms_top_n_test,
        },
        "ROI_HEADS": {
            "NAME": "Res5ROIHeads" if c4 else "StandardROIHeads",
            "NUM_CLASSES": classes,
            "IN_FEATURES": maps[:4],
        },
        "ROI_BOX_HEAD": {**box, "FC_DIM": model.fpn_hidden},
        "ROI_MASK_HEAD": {**mask, "CONV_DIM": model.mask_channels},
    }
    if pyramid:
        model_config["FPN"] = {"IN_FEATURES": stages, "OUT_CHANNELS": model.fpn_channels}
    size = {
        "FORMAT": input_options.order.upper(),
        "MIN_SIZE_TRAIN": list(input_options.min_sizes),
        "MIN_SIZE_TEST": input_options.min_sizes[-1],
        "MAX_SIZE_TRAIN": input_options.max_size,
        "MAX_SIZE_TEST": input_options.max_size,
    }
    return {"VERSION": 2, "MODEL": model_config, "INPUT": size}


def _check(run: Path, meta: CheckpointMetadata, format: str) -> None:
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
    if unsupported:
        raise InputError(f"{run}: {format} has no network with {', '.join(unsupported)}")


def _notes(recipe: Recipe, format: str) -> tuple[str, ...]:
    """How the other program's results will differ."""
    model, notes = recipe.model, []
    if _RESIZE.get(recipe.input.resize) != format:
        notes.append(f"{format} resizes images differently from input.resize={recipe.input.resize}")
    if model.masks and model.mask_pasting != {"detectron2": "padded"}.get(format, format):
        notes.append(f"{format} pastes masks differently within half a cell of the edges of their boxes")
    if recipe.input.size_divisibility != 32 and model.neck == "fpn":
        notes.append(f"{format} pads images to multiples of 32; this network was trained without padding")
    if format == "torchvision":
        if model.pooling == "align":
            notes.append(
                "torchvision pools half a cell off from where this network was trained to pool, which costs accuracy"
            )
        if not model.torchvision_anchors:
            notes.append("torchvision rounds the corners of anchors, changing them by less than half a pixel")
        sizes, defaults = tuple((size,) for size in model.anchor_sizes), ModelOptions()
        if (model.anchor_sizes, model.anchor_ratios) != (defaults.anchor_sizes, defaults.anchor_ratios):
            notes.append(f"build it with AnchorGenerator({sizes}, ({model.anchor_ratios},) * {len(sizes)})")
    return tuple(notes)


def _shift_anchors(recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adjust the deltas for anchors at the corners of cells, as in torchvision, instead of at `anchor_offset`."""
    model, name = recipe.model, "rpn.delta.bias"
    if not model.anchor_offset:
        return tensors
    strides = (4, 8, 16, 32, 64)
    per_size = [stride / size for stride, size in zip(strides, model.anchor_sizes, strict=True)]
    if max(per_size) - min(per_size) > 1e-6:
        raise InputError(
            "model.anchor_offset: torchvision's anchors have none, and it can be moved into the deltas only if each of "
            "model.anchor_sizes is the same multiple of its stride"
        )
    shift = model.anchor_offset * per_size[0]
    roots = [ratio**0.5 for ratio in model.anchor_ratios]
    by_ratio = torch.tensor([[shift * root, shift / root, 0.0, 0.0] for root in roots])
    return {**tensors, name: tensors[name] + by_ratio.flatten()}


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        write(Path(temporary))
