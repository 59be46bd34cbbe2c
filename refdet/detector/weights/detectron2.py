"""Detectors and ImageNet backbones of detectron2, and Caffe2's ImageNet backbones.

Supports Mask and Faster R-CNN of the model zoo with ResNet-50 and 101, as C4, DC5 and FPN. The network is inferred from
the names and shapes of its tensors. The file does not say which convolution of a block has the stride, nor the order of
the color channels; files since detectron2 0.3 do not say how pixels are normalized either. All this is assumed to be as
in the model zoo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.detector.checkpoint import MAX_CATEGORIES
from refdet.detector.resnet import BLOCKS
from refdet.detector.weights.conversion import (
    AnchorsBySize,
    BackgroundLast,
    ConvertedWeights,
    Layout,
    NameMapping,
    NoBackground,
    convert_tensors,
    count_blocks,
    num_rows,
    rename_tensors,
)
from refdet.errors import InputError
from refdet.files.short_text import short_repr

# constants of the model, which refdet takes from the recipe
_IGNORED = re.compile(r"pixel_(mean|std)$|(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+$")
_OTHER_HEADS = {
    "roi_heads.keypoint_head.": "a detectron2 Keypoint R-CNN",
    "sem_seg_head.": "a detectron2 Panoptic FPN",
    "roi_heads.box_head.0.": "a detectron2 Cascade R-CNN",
    "roi_heads.box_predictor.0.": "a detectron2 Cascade R-CNN",
}
_UNSUPPORTED_NORMS = re.compile(r"backbone\.fpn_\w+\.norm\.|roi_heads\.(box|mask)_head\.\w+\.norm\.")
_SCORES = "roi_heads.box_predictor.cls_score.weight"
SUPPORTED = "supported are Mask and Faster R-CNN with ResNet-50 or 101 as C4, DC5 or FPN"
# Caffe2's names of ImageNet backbones -> detectron2's
_CAFFE2 = (
    (r"^res_conv1_bn_", "stem.conv1.norm."),
    (r"^conv1_", "stem.conv1."),
    (r"^(res\d)_(\d+)_branch1_bn_", r"\1.\2.shortcut.norm."),
    (r"^(res\d)_(\d+)_branch1_", r"\1.\2.shortcut."),
    (r"^(res\d)_(\d+)_branch2([abc])_bn_", r"\1.\2.conv\3.norm."),
    (r"^(res\d)_(\d+)_branch2([abc])_", r"\1.\2.conv\3."),
)
# the classifier, and Caffe2's optimizer state
_UNUSED_BY_BACKBONE = re.compile(r"stem\.fc\.|(fc1000|pred)_[wb]$|.*_momentum$")
_CAFFE2_CONVS = {"a": "1", "b": "2", "c": "3"}
_CAFFE2_SUFFIXES = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def is_detector(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of a detectron2 detector."""
    return any(name.startswith(("proposal_generator.", "backbone.bottom_up.", "backbone.res2.")) for name in state_dict)


def identify(state_dict: Mapping[str, Tensor]) -> ConvertedWeights:
    """Identify a detector of the model zoo and convert its weights.

    Raises:
        InputError: an unsupported head or backbone; the message says which, and what is supported.
    """
    for prefix, description in _OTHER_HEADS.items():
        if any(name.startswith(prefix) for name in state_dict):
            raise InputError(f"{description}, which cannot be imported; {SUPPORTED}")
    if not any(name.startswith("proposal_generator.") for name in state_dict):
        raise InputError(f"a detectron2 network without proposals, such as RetinaNet; {SUPPORTED}")
    if any(_UNSUPPORTED_NORMS.match(name) for name in state_dict):
        raise InputError(f"a detectron2 detector with norms in its pyramid or heads (GN or SyncBN); {SUPPORTED}")
    num_deltas = num_rows(state_dict, "roi_heads.box_predictor.bbox_pred.weight", 0)
    classes = max(num_rows(state_dict, _SCORES, 81) - 1, 1)
    if num_deltas == 4 and classes > 1:
        raise InputError(f"a detectron2 detector with one box for all classes (CLS_AGNOSTIC_BBOX_REG); {SUPPORTED}")
    pyramid = any(name.startswith("backbone.fpn_") for name in state_dict)
    backbone = "backbone.bottom_up." if pyramid else "backbone."
    res5_in_heads = any(name.startswith("roi_heads.res5.") for name in state_dict)
    neck = "fpn" if pyramid else "c4" if res5_in_heads else "dc5"
    res5 = "roi_heads.res5." if neck == "c4" else f"{backbone}res5."
    recipe = recipes.load(f"d2-{neck}-res{_depth(state_dict, backbone, res5)}")
    masks = any(name.startswith("roi_heads.mask_head.") for name in state_dict)
    if not masks:
        recipe = recipe.with_changes(["model.masks=false"])
    if classes > MAX_CATEGORIES:
        raise InputError(f"cls_score.weight: {classes} classes, more than the limit of {MAX_CATEGORIES}")
    _check_normalization(state_dict, recipe)
    ignored = [name for name in state_dict if _IGNORED.match(name)]
    tensors = convert_tensors(recipe, classes, state_dict, name_mapping(recipe), ignored)
    kind = f"detectron2's {'Mask' if masks else 'Faster'} R-CNN with a ResNet-{recipe.model.depth} as {neck.upper()}"
    return ConvertedWeights(kind, recipe, classes, tensors, (), label_order="ascending_ids")


def _check_normalization(state_dict: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Raise InputError if the file has means or standard deviations of pixels, and they are not the recipe's."""
    for name, expected in (("pixel_mean", recipe.input.mean), ("pixel_std", recipe.input.std)):
        values = state_dict.get(name, torch.tensor(expected)).flatten().tolist()
        if len(values) != 3 or not all(abs(a - b) < 0.01 for a, b in zip(values, expected, strict=True)):  # NaN too
            given = short_repr([round(value, 3) for value in values[:4]])
            raise InputError(
                f"a detectron2 detector with {name} {given}, the model zoo's have {list(expected)}; {SUPPORTED}"
            )


def name_mapping(recipe: Recipe) -> NameMapping:
    """detectron2's names and layouts for the tensors of a network."""
    model = recipe.model
    box, mask = "roi_heads.box_predictor.", "roi_heads.mask_head."
    prefixes = {
        "rpn.conv.": "proposal_generator.rpn_head.conv.",
        "rpn.score.": "proposal_generator.rpn_head.objectness_logits.",
        "rpn.delta.": "proposal_generator.rpn_head.anchor_deltas.",
        "head.box.score.": f"{box}cls_score.",
        "head.box.delta.": f"{box}bbox_pred.",
        "head.fc6.": "roi_heads.box_head.fc1.",
        "head.fc7.": "roi_heads.box_head.fc2.",
        "head.mask.logits.": f"{mask}predictor.",
        "head.conv5.": "roi_heads.res5.",
    }
    if model.neck == "c4":
        prefixes["head.mask.hidden.0."] = f"{mask}deconv."
    else:
        prefixes |= {f"head.mask.hidden.{2 * index}.": f"{mask}mask_fcn{index + 1}." for index in range(4)}
        prefixes["head.mask.hidden.8."] = f"{mask}deconv."
    backbone = "backbone.bottom_up." if model.neck == "fpn" else "backbone."
    for level in range(4):
        prefixes[f"neck.lateral.{level}."] = f"backbone.fpn_lateral{level + 2}."
        prefixes[f"neck.output.{level}."] = f"backbone.fpn_output{level + 2}."
        prefixes[f"backbone.layer{level + 1}."] = f"{backbone}res{level + 2}."
    prefixes["backbone."] = f"{backbone}stem."
    sizes = 1 if model.neck == "fpn" else len(model.anchor_sizes)
    anchors = AnchorsBySize(sizes, len(model.anchor_ratios))
    layouts: dict[str, Layout] = {
        "rpn.score.": anchors,
        "rpn.delta.": anchors,
        "head.box.score.": BackgroundLast(),
        "head.box.delta.": NoBackground(4),
        "head.mask.logits.": NoBackground(1),
    }
    return NameMapping(prefixes, layouts, _block_name)


def _block_name(name: str) -> str:
    """Rename a tensor of a ResNet: torchvision's ``bn1`` is detectron2's ``conv1.norm``."""
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"(^|\.)bn(\d)\.", r"\1conv\2.norm.", name)


def _depth(state_dict: Mapping[str, Tensor], backbone: str, res5: str) -> int:
    """Depth of the ResNet from its number of blocks per stage.

    Args:
        state_dict: name -> tensor.
        backbone: prefix of the backbone's names.
        res5: prefix of res5's names, which is in the heads of a C4 network.

    Raises:
        InputError: an unsupported backbone.
    """
    stages = [f"{backbone}res2.", f"{backbone}res3.", f"{backbone}res4.", res5]
    blocks = tuple(count_blocks(state_dict, stage) for stage in stages)
    depth = next((depth for depth in (50, 101) if BLOCKS[depth] == blocks), None)
    if depth is None or f"{backbone}stem.conv1.weight" not in state_dict:
        raise InputError(f"a detectron2 detector with another backbone ({_describe_blocks(blocks)}); {SUPPORTED}")
    shape = state_dict.get(f"{backbone}res2.0.conv1.weight", torch.zeros(0)).shape
    if shape[:1] != (64,):
        raise InputError(f"a detectron2 detector with a ResNeXt or another width; {SUPPORTED}")
    return depth


def _describe_blocks(blocks: tuple[int, ...]) -> str:
    return f"blocks per stage: {', '.join(map(str, blocks))}" if any(blocks) else "no ResNet"


def is_backbone(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of an ImageNet backbone of detectron2 or Caffe2."""
    return {"stem.conv1.weight", "res2.0.conv1.weight"} <= set(state_dict) or {"conv1_w", "res2_0_branch2a_w"} <= set(
        state_dict
    )


def to_torchvision_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an ImageNet backbone as torchvision does, without the classifier.

    Caffe2's norms have a scale and shift only; mean 0 and variance 1 are added, as detectron2 does.
    """
    backbone = {name: value for name, value in state_dict.items() if not _UNUSED_BY_BACKBONE.match(name)}
    renamed = rename_tensors(backbone, lambda name: _torchvision_name(_from_caffe2(name)))
    for name, value in list(renamed.items()):
        norm, _, end = name.rpartition(".")
        if end == "bias" and ("bn" in norm or norm.endswith("downsample.1")):
            renamed.setdefault(f"{norm}.running_mean", torch.zeros_like(value))
            renamed.setdefault(f"{norm}.running_var", torch.ones_like(value))
    return renamed


def _torchvision_name(name: str) -> str:
    """The name in torchvision of a tensor of detectron2's ImageNet backbones."""
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name.removeprefix("stem."))
    name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", name)


def _from_caffe2(name: str) -> str:
    """detectron2's name for a tensor of Caffe2; other names are returned unchanged."""
    for expression, replacement in _CAFFE2:
        changed, replacements = re.subn(expression, replacement, name)
        if replacements:
            changed = re.sub(r"conv([abc])\.", lambda match: f"conv{_CAFFE2_CONVS[match[1]]}.", changed)
            start, _, end = changed.rpartition(".")
            return f"{start}.{_CAFFE2_SUFFIXES.get(end, end)}"
    return name
