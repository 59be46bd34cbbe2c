"""Identify the network of another program's weights and rename its tensors.

Supports the reference's checkpoints (lichengunc/mask-faster-rcnn, Mask and Faster R-CNN), ImageNet ResNets in Caffe and
torchvision style, and the detectors of the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.detector.checkpoint import HEADS, MOST_CATEGORIES
from refdet.detector.resnet import BLOCKS
from refdet.detector.weights import detectron2, torchvision
from refdet.detector.weights.fitting import ConvertedWeights, Naming, Pairs, count, differences, fit, rows
from refdet.errors import InputError

REFERENCE_PARTS = {
    "rpn.conv.": "rpn_net.",
    "rpn.score.": "rpn_cls_score_net.",
    "rpn.delta.": "rpn_bbox_pred_net.",
    "head.box.score.": "cls_score_net.",
    "head.box.delta.": "bbox_pred_net.",
    "head.mask.hidden.0.": "mask_up_sampling.",
    "head.mask.logits.": "mask_pred_net.",
    "head.conv5.": "resnet.layer4.",
    "backbone.": "resnet.",
}
RESNET_PARTS = {"head.conv5.": "layer4.", "backbone.": ""}
IMAGENET_CLASSIFIER = ("fc.weight", "fc.bias")  # unused by a detector
# Output variance / squared norm of the first filters: hundreds or more for inputs in 0..255 (variance 58 ** 2), a few
# for normalised ones (variance 1), times the correlation of neighbouring pixels.
CAFFE_GAIN = 100.0


def identify_checkpoint(tensors: Mapping[str, Tensor], style: str | None = None) -> ConvertedWeights:
    """Identify the network of another program's tensors.

    Args:
        tensors: name -> tensor.
        style: "caffe" or "torchvision", of an ImageNet ResNet; None to detect it.

    Raises:
        InputError: unknown network; the message lists missing and unexpected tensors.
    """
    given = {name.removeprefix("module."): value for name, value in tensors.items()}
    if detectron2.is_backbone(given):
        return _resnet(detectron2.in_torchvision_names(given), style, caffe="d2-c4")
    detector = next((program.identify for program in (detectron2, torchvision) if program.is_detector(given)), None)
    if detector is not None:
        _refuse_style(style)
        return detector(given)
    if any(name.startswith(("resnet.", "rpn_")) for name in given):
        _refuse_style(style)
        return _reference(given)
    return _resnet(given, style)


def _refuse_style(style: str | None) -> None:
    if style is not None:
        raise InputError(f"`style` {style}: this is a detector, only an ImageNet ResNet has a choice of styles")


def _reference(given: dict[str, Tensor]) -> ConvertedWeights:
    depth = _depth(given, "resnet.")
    anchors = rows(given, "rpn_cls_score_net.weight", 24) // 2
    name = {12: f"reference-c4-res{depth}", 15: f"reference-c4-res{depth}-lg"}.get(anchors, "")
    if name not in recipes.names():
        raise InputError(
            f"rpn_cls_score_net.weight: {anchors} anchors a cell with a ResNet-{depth} match no recipe; supported are "
            "12 (scales 4, 8, 16, 32) with 50, 101 and 152, and 15 (and scale 2) with 101"
        )
    masks = any(key.startswith("mask_") for key in given)
    classes = max(rows(given, "cls_score_net.weight", 81) - 1, 1)
    if classes > MOST_CATEGORIES:
        raise InputError(f"cls_score_net.weight: {classes} classes, more than the limit of {MOST_CATEGORIES}")
    recipe = recipes.load(name).with_changes([] if masks else ["model.masks=false"])
    ignored = [f"resnet.{name}" for name in IMAGENET_CLASSIFIER]
    converted = fit(recipe, classes, given, Naming(REFERENCE_PARTS, {"rpn.score.": Pairs()}), ignored)
    kind = f"the reference's {'Mask' if masks else 'Faster'} R-CNN with a ResNet-{depth}, {anchors} anchors a cell"
    return ConvertedWeights(kind, recipe, classes, converted, ())


def _resnet(given: dict[str, Tensor], style: str | None, caffe: str = "reference-c4") -> ConvertedWeights:
    depth = _depth(given, "")
    style = style or ("torchvision" if depth < 50 else _style(given))
    if style == "caffe":
        if f"{caffe}-res{depth}" not in recipes.names():
            few = f"{depth}" if depth >= 50 else "fewer than 50"
            raise InputError(f"`style='caffe'`: no recipe for a Caffe ResNet of {few} layers")
        recipe = recipes.load(f"{caffe}-res{depth}")
    else:
        name = f"c4-res{depth}" if f"c4-res{depth}" in recipes.names() else "c4-res101"
        recipe = recipes.load(name).with_changes([f"name=c4-res{depth}", f"model.depth={depth}", "model.norm=frozen"])
    tensors = fit(recipe, 0, given, Naming(RESNET_PARTS, {}), IMAGENET_CLASSIFIER, untrained=HEADS)
    return ConvertedWeights(f"an ImageNet ResNet-{depth} in {style} style", recipe, None, tensors, HEADS)


def _depth(given: Mapping[str, Tensor], prefix: str) -> int:
    """Depth of the ResNet from its blocks, even if some of their tensors are missing."""
    blocks = tuple(count(given, f"{prefix}layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = any(name.startswith(f"{prefix}layer") and ".conv3." in name for name in given)
    depths = [depth for depth, known in BLOCKS.items() if known == blocks and (depth >= 50) == bottleneck]
    if depths:
        return depths[0]
    needed = [f"{prefix}conv1.weight", *(f"{prefix}layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4))]
    raise InputError(
        "unknown network (supported are Mask and Faster R-CNN of the reference, detectron2 and torchvision, and "
        "ImageNet ResNets): "
        + differences((n for n in needed if n not in given), (n for n in given if n not in needed))
        + (f"; blocks per stage: {', '.join(map(str, blocks))}" if any(blocks) else "")
    )


def _style(given: Mapping[str, Tensor]) -> str:
    """Caffe or torchvision style, whose tensors have the same names and shapes.

    Batch norms count batches since PyTorch 0.4, later than the conversions from Caffe. Without a counter, the ratio of
    the first norm's variances to its filters gives the range of the input.
    """
    if any(name.endswith("num_batches_tracked") for name in given):
        return "torchvision"
    weight, variance = given.get("conv1.weight"), given.get("bn1.running_var")
    if weight is None or variance is None or weight.shape[1:] != (3, 7, 7) or variance.shape != weight.shape[:1]:
        return "caffe"  # reported later
    filters = weight.float().flatten(1).square().sum(1)
    gain = (variance.float() / filters.clamp(min=1e-12)).median().item()
    untouched = bool((variance == 1).all())
    return "caffe" if gain > CAFFE_GAIN or untouched else "torchvision"
