"""Detectors of lichengunc/mask-faster-rcnn and of its predecessors, tf-faster-rcnn and pytorch-faster-rcnn.

All three name their tensors alike, the first after pytorch-faster-rcnn's conversion from TensorFlow. Supported are Mask
and Faster R-CNN with ResNet-50, 101 and 152, and Faster R-CNN with VGG-16 and MobileNet v1. What a file does not tell:
the pooling, and the epsilon of the norms.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.detector.backbones import MOBILENET_WIDTH, network_name
from refdet.detector.checkpoint import MAX_CATEGORIES
from refdet.detector.mobilenet import LAYERS, ON_ROIS
from refdet.detector.resnet import BLOCKS
from refdet.detector.vgg import STAGES
from refdet.detector.weights.fitting import ConvertedWeights, Naming, Pairs, count, differences, fit, rows
from refdet.detector.weights.torchvision import with_usual_eps
from refdet.errors import InputError

IMAGENET_CLASSIFIER = ("fc.weight", "fc.bias")  # unused by a detector
TENSORFLOW_EPS = 1e-3  # of a MobileNet's norms in tf-faster-rcnn; 1e-5 in the other two
# programs whose checkpoints have these names but other arithmetic
STYLES = ("tf-faster-rcnn", "pytorch-faster-rcnn")
_PARTS = {
    "rpn.conv.": "rpn_net.",
    "rpn.score.": "rpn_cls_score_net.",
    "rpn.delta.": "rpn_bbox_pred_net.",
    "head.box.score.": "cls_score_net.",
    "head.box.delta.": "bbox_pred_net.",
    "head.mask.hidden.0.": "mask_up_sampling.",
    "head.mask.logits.": "mask_pred_net.",
}
_SIZES = {9: (128, 256, 512), 12: (64, 128, 256, 512), 15: (32, 64, 128, 256, 512)}  # anchors a cell, of three ratios


def is_detector(given: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of one of these detectors."""
    return any(name.startswith(("resnet.", "vgg.", "mobilenet.", "rpn_")) for name in given)


def identify(given: Mapping[str, Tensor], style: str | None) -> ConvertedWeights:
    """Identify a detector and convert its weights.

    Args:
        given: name -> tensor.
        style: one of `STYLES`; None for lichengunc/mask-faster-rcnn.

    Raises:
        InputError: another network; the message says what is supported.
    """
    prefix = next((part for part in ("vgg.", "mobilenet.") if any(n.startswith(part) for n in given)), "resnet.")
    masks = any(name.startswith("mask_") for name in given)
    if masks and prefix == "vgg.":
        raise InputError("a VGG-16 with a mask branch, which cannot be imported; a Faster R-CNN with it can")
    anchors = rows(given, "rpn_cls_score_net.weight", 24) // 2
    classes = max(rows(given, "cls_score_net.weight", 81) - 1, 1)
    if classes > MAX_CATEGORIES:
        raise InputError(f"cls_score_net.weight: {classes} classes, more than the limit of {MAX_CATEGORIES}")
    recipe = _recipe(given, prefix, anchors)
    if masks != recipe.model.masks:
        recipe = recipe.with_changes([f"model.masks={str(masks).lower()}"])
    if style == "pytorch-faster-rcnn":
        recipe = recipe.with_changes(["model.pooling=align_legacy", "model.sampling_ratio=0"])
    if style == "tf-faster-rcnn" and prefix == "mobilenet.":
        given = with_usual_eps(given, TENSORFLOW_EPS)
    ignored = [f"{prefix}{name}" for name in IMAGENET_CLASSIFIER]
    tensors = fit(recipe, classes, given, naming(recipe), ignored)
    kind = (
        f"{style or 'the reference'}'s {'Mask' if masks else 'Faster'} R-CNN with a {network_name(recipe.model)}, "
        f"{anchors} anchors a cell"
    )
    return ConvertedWeights(kind, recipe, classes, tensors, ())


def naming(recipe: Recipe) -> Naming:
    """The names of these programs for a network of refdet."""
    parts = {
        "vgg16": vgg_parts("vgg."),
        "mobilenet_v1": mobilenet_parts("mobilenet."),
        "resnet": {"head.conv5.": "resnet.layer4.", "backbone.": "resnet."},
    }
    return Naming(_PARTS | parts[recipe.model.backbone], {"rpn.score.": Pairs()})


def vgg_parts(prefix: str, fc6: int = 0) -> dict[str, str]:
    """Prefixes of refdet for a VGG-16 -> torchvision's, which number ReLUs, poolings and dropouts too.

    Args:
        prefix: of torchvision's names.
        fc6: number of the first linear layer.
    """
    parts, number, layer = {}, 0, 0
    for _, convolutions in STAGES:
        for _ in range(convolutions):
            parts[f"backbone.convs.{number}."] = f"{prefix}features.{layer}."
            number, layer = number + 1, layer + 2
        layer += 1
    return parts | {"head.fc6.": f"{prefix}classifier.{fc6}.", "head.fc7.": f"{prefix}classifier.{fc6 + 3}."}


def mobilenet_parts(prefix: str) -> dict[str, str]:
    """Prefixes of refdet for a MobileNet v1 -> those of these programs and of TensorFlow."""
    first = 1 + len(LAYERS) - ON_ROIS
    parts = {f"backbone.layers.{number}.": f"{prefix}Conv2d_{number}." for number in range(first)}
    return parts | {f"head.conv5.{number}.": f"{prefix}Conv2d_{first + number}." for number in range(ON_ROIS)}


def vgg_changes(given: Mapping[str, Tensor], prefix: str, fc6: int = 0) -> list[str]:
    """What is another width than the recipe's, as ``key=value``."""
    width, hidden = rows(given, f"{prefix}features.0.weight", 64), rows(given, f"{prefix}classifier.{fc6}.weight", 4096)
    changes = [] if width == 64 else [f"model.width={width}"]
    return changes if hidden == 4096 else [*changes, f"model.fpn_hidden={hidden}"]


def mobilenet_changes(given: Mapping[str, Tensor], prefix: str) -> list[str]:
    """What is another depth multiplier than the recipe's, as ``key=value``."""
    width = rows(given, f"{prefix}Conv2d_0.0.weight", MOBILENET_WIDTH)
    return [] if width == MOBILENET_WIDTH else [f"model.width={width}"]


def resnet_depth(given: Mapping[str, Tensor], prefix: str) -> int:
    """Depth of a ResNet from its blocks, even if some of their tensors are missing.

    Raises:
        InputError: no ResNet; the message lists missing and unexpected tensors.
    """
    blocks = tuple(count(given, f"{prefix}layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = any(name.startswith(f"{prefix}layer") and ".conv3." in name for name in given)
    depths = [depth for depth, known in BLOCKS.items() if known == blocks and (depth >= 50) == bottleneck]
    if depths:
        return depths[0]
    needed = [f"{prefix}conv1.weight", *(f"{prefix}layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4))]
    raise InputError(
        "unknown network (supported are Mask and Faster R-CNN of the reference, detectron2 and torchvision, and "
        "ResNets, VGG-16 and MobileNet v1 of ImageNet): "
        + differences((n for n in needed if n not in given), (n for n in given if n not in needed))
        + (f"; blocks per stage: {', '.join(map(str, blocks))}" if any(blocks) else "")
    )


def _recipe(given: Mapping[str, Tensor], prefix: str, anchors: int) -> Recipe:
    """The recipe of a network and its anchors, without regard to masks."""
    if prefix == "resnet.":
        name = f"reference-c4-res{resnet_depth(given, prefix)}"
    else:
        name = {"vgg.": "reference-vgg16", "mobilenet.": "reference-mobilenet-v1"}[prefix]
    if anchors == 15:
        name += "-lg"
    if name not in recipes.names() or anchors not in _SIZES:
        network = f"ResNet-{name.partition('-res')[2].removesuffix('-lg')}" if prefix == "resnet." else prefix[:-1]
        raise InputError(
            f"rpn_cls_score_net.weight: {anchors} anchors a cell with a {network} match no recipe; supported are "
            "9 (scales 8, 16, 32) and 12 (and scale 4) with ResNet-50, 101 and 152, VGG-16 and MobileNet v1, and 15 "
            "(and scale 2) with ResNet-101"
        )
    changes = [] if anchors != 9 else [f"model.anchor_sizes={list(_SIZES[9])}"]
    if prefix == "mobilenet.":
        changes += mobilenet_changes(given, prefix)
    if prefix == "vgg.":
        changes += vgg_changes(given, prefix)
    return recipes.load(name).with_changes(changes)
