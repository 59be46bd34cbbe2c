"""Detectors of lichengunc/mask-faster-rcnn and of its predecessors, tf-faster-rcnn and pytorch-faster-rcnn.

All three use the same tensor names (for tf-faster-rcnn, after pytorch-faster-rcnn's conversion). Supports Mask and
Faster R-CNN with ResNet-50, 101 and 152, and Faster R-CNN with VGG-16 and MobileNet v1. A file does not show which
pooling and which epsilon in norms its program uses.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.detector.backbone_channels import MOBILENET_WIDTH, network_name
from refdet.detector.checkpoint import MAX_CATEGORIES
from refdet.detector.mobilenet import LAYERS, NUM_ROI_LAYERS
from refdet.detector.vgg import STAGES
from refdet.detector.weights.conversion import (
    ConvertedWeights,
    LogitPairs,
    NameMapping,
    convert_tensors,
    count_blocks,
    describe_mismatch,
    find_resnet_depth,
    num_rows,
)
from refdet.detector.weights.torchvision import convert_eps
from refdet.errors import InputError

IMAGENET_CLASSIFIER = ("fc.weight", "fc.bias")  # unused by a detector
TENSORFLOW_EPS = 1e-3  # of a MobileNet's norms in tf-faster-rcnn; the other two programs use 1e-5
# programs whose checkpoints have the same names but compute differently
WEIGHT_FORMATS = ("tf-faster-rcnn", "pytorch-faster-rcnn")
_PREFIXES = {
    "rpn.conv.": "rpn_net.",
    "rpn.score.": "rpn_cls_score_net.",
    "rpn.delta.": "rpn_bbox_pred_net.",
    "head.box.score.": "cls_score_net.",
    "head.box.delta.": "bbox_pred_net.",
    "head.mask.hidden.0.": "mask_up_sampling.",
    "head.mask.logits.": "mask_pred_net.",
}
_ANCHORS_PER_CELL = (9, 12, 15)  # three ratios of 3, 4 or 5 sizes, the largest 512
_SIZES_OF_9_ANCHORS = [128, 256, 512]  # for 12 and 15 anchors, recipes have the sizes


def is_detector(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of one of these detectors."""
    return any(name.startswith(("resnet.", "vgg.", "mobilenet.", "rpn_")) for name in state_dict)


def identify(state_dict: Mapping[str, Tensor], weight_format: str | None) -> ConvertedWeights:
    """Identify a detector and convert its weights.

    Args:
        state_dict: name -> tensor.
        weight_format: one of `WEIGHT_FORMATS`; None for lichengunc/mask-faster-rcnn.

    Raises:
        InputError: an unsupported network; the message says what is supported.
    """
    prefix = "resnet."
    for other in ("vgg.", "mobilenet."):
        if any(name.startswith(other) for name in state_dict):
            prefix = other
    masks = any(name.startswith("mask_") for name in state_dict)
    if masks and prefix == "vgg.":
        raise InputError("a VGG-16 with a mask branch, which cannot be imported; only a Faster R-CNN with VGG-16 can")
    anchors = num_rows(state_dict, "rpn_cls_score_net.weight", 24) // 2  # two logits each
    classes = max(num_rows(state_dict, "cls_score_net.weight", 81) - 1, 1)
    if classes > MAX_CATEGORIES:
        raise InputError(f"cls_score_net.weight: {classes} classes, more than the limit of {MAX_CATEGORIES}")
    recipe = _identify_recipe(state_dict, prefix, anchors)
    if masks != recipe.model.masks:
        recipe = recipe.with_changes([f"model.masks={str(masks).lower()}"])
    if weight_format == "pytorch-faster-rcnn":
        recipe = recipe.with_changes(["model.pooling=align_legacy", "model.sampling_ratio=0"])
    if weight_format == "tf-faster-rcnn" and prefix == "mobilenet.":
        state_dict = convert_eps(state_dict, TENSORFLOW_EPS)
    ignored = [f"{prefix}{name}" for name in IMAGENET_CLASSIFIER]
    tensors = convert_tensors(recipe, classes, state_dict, name_mapping(recipe), ignored)
    kind = (
        f"{weight_format or 'the reference'}'s {'Mask' if masks else 'Faster'} R-CNN with a "
        f"{network_name(recipe.model)}, {anchors} anchors per cell"
    )
    return ConvertedWeights(kind, recipe, classes, tensors, ())


def name_mapping(recipe: Recipe) -> NameMapping:
    """Names and layouts that the three programs use for the tensors of a network."""
    backbone_prefixes = {
        "vgg16": vgg_prefixes("vgg."),
        "mobilenet_v1": mobilenet_prefixes("mobilenet."),
        "resnet": {"head.conv5.": "resnet.layer4.", "backbone.": "resnet."},
    }
    return NameMapping(_PREFIXES | backbone_prefixes[recipe.model.backbone], {"rpn.score.": LogitPairs()})


def vgg_prefixes(prefix: str, fc6: int = 0) -> dict[str, str]:
    """Refdet's prefixes for a VGG-16 -> torchvision's, whose indices also count ReLUs, pooling layers and dropouts.

    Args:
        prefix: start of torchvision's names.
        fc6: index of the first linear layer in torchvision's classifier.
    """
    prefixes, index, layer = {}, 0, 0
    for _, convolutions in STAGES:
        for _ in range(convolutions):
            prefixes[f"backbone.convs.{index}."] = f"{prefix}features.{layer}."
            index, layer = index + 1, layer + 2
        layer += 1
    return prefixes | {"head.fc6.": f"{prefix}classifier.{fc6}.", "head.fc7.": f"{prefix}classifier.{fc6 + 3}."}


def mobilenet_prefixes(prefix: str) -> dict[str, str]:
    """Refdet's prefixes for a MobileNet v1 -> those of the three programs, which are TensorFlow's."""
    first = 1 + len(LAYERS) - NUM_ROI_LAYERS  # number of the first layer in the head; layer 0 is not in `LAYERS`
    prefixes = {f"backbone.layers.{number}.": f"{prefix}Conv2d_{number}." for number in range(first)}
    return prefixes | {f"head.conv5.{number}.": f"{prefix}Conv2d_{first + number}." for number in range(NUM_ROI_LAYERS)}


def vgg_changes(state_dict: Mapping[str, Tensor], prefix: str, fc6: int = 0) -> list[str]:
    """Recipe changes (``key=value``) for a VGG-16 whose widths differ from the recipe's."""
    width = num_rows(state_dict, f"{prefix}features.0.weight", 64)
    hidden = num_rows(state_dict, f"{prefix}classifier.{fc6}.weight", 4096)
    changes = []
    if width != 64:
        changes.append(f"model.width={width}")
    if hidden != 4096:
        changes.append(f"model.fc_dim={hidden}")
    return changes


def mobilenet_changes(state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Recipe changes (``key=value``) for a MobileNet v1 whose depth multiplier differs from the recipe's."""
    width = num_rows(state_dict, f"{prefix}Conv2d_0.0.weight", MOBILENET_WIDTH)
    return [] if width == MOBILENET_WIDTH else [f"model.width={width}"]


def resnet_depth(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Depth of a ResNet; raises InputError if it is no ResNet, with the missing and unexpected tensors."""
    depth = find_resnet_depth(state_dict, prefix)
    if depth is not None:
        return depth
    stages = [f"{prefix}layer{stage}." for stage in (1, 2, 3, 4)]
    blocks = [count_blocks(state_dict, stage) for stage in stages]
    expected = [f"{prefix}conv1.weight", *(f"{stage}0.conv1.weight" for stage in stages)]
    raise InputError(
        "unknown network (supported are Mask and Faster R-CNN of the reference, detectron2 and torchvision, and "
        "ResNets, VGG-16 and MobileNet v1 of ImageNet): "
        + describe_mismatch(set(expected) - set(state_dict), set(state_dict) - set(expected))
        + (f"; blocks per stage: {', '.join(map(str, blocks))}" if any(blocks) else "")
    )


def _identify_recipe(state_dict: Mapping[str, Tensor], prefix: str, anchors: int) -> Recipe:
    """The recipe for a network and its anchors; the caller sets `model.masks`.

    Args:
        state_dict: name -> tensor.
        prefix: prefix of the backbone's names: "resnet.", "vgg." or "mobilenet.".
        anchors: anchors per cell.

    Raises:
        InputError: there is no such recipe.
    """
    depth = resnet_depth(state_dict, prefix) if prefix == "resnet." else 0
    name = {"vgg.": "reference-vgg16", "mobilenet.": "reference-mobilenet-v1"}.get(prefix, f"reference-c4-res{depth}")
    if anchors == 15:
        name += "-lg"
    if name not in recipes.names() or anchors not in _ANCHORS_PER_CELL:
        network = f"ResNet-{depth}" if depth else prefix.removesuffix(".")
        raise InputError(
            f"rpn_cls_score_net.weight: {anchors} anchors per cell with a {network} match no recipe; supported are "
            "9 (scales 8, 16, 32) and 12 (and scale 4) with ResNet-50, 101 and 152, VGG-16 and MobileNet v1, and 15 "
            "(and scale 2) with ResNet-101"
        )
    changes = [f"model.anchor_sizes={_SIZES_OF_9_ANCHORS}"] if anchors == 9 else []
    if prefix == "mobilenet.":
        changes += mobilenet_changes(state_dict, prefix)
    if prefix == "vgg.":
        changes += vgg_changes(state_dict, prefix)
    return recipes.load(name).with_changes(changes)
