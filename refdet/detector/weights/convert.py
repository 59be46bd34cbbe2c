"""Identify the network of another program's weights and rename its tensors.

Supports the reference's checkpoints (lichengunc/mask-faster-rcnn, Mask and Faster R-CNN) and ImageNet ResNets in Caffe
and torchvision style.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.detector.checkpoint import HEADS, MOST_CATEGORIES
from refdet.detector.finite import LARGEST_WEIGHT, unusable
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.resnet import BLOCKS
from refdet.errors import InputError
from refdet.files.short_text import cut

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


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights under refdet's names.

    Attributes:
        kind: human-readable description.
        recipe: the network.
        classes: number of object classes, None for a network without detection heads.
        tensors: name -> float32 tensor, for all parameters and buffers except `untrained`.
        untrained: prefixes of the names that the file does not have.
    """

    kind: str
    recipe: Recipe
    classes: int | None
    tensors: dict[str, Tensor]
    untrained: tuple[str, ...]


def identify_checkpoint(tensors: Mapping[str, Tensor], style: str | None = None) -> ConvertedWeights:
    """Identify the network of another program's tensors.

    Args:
        tensors: name -> tensor.
        style: "caffe" or "torchvision", of an ImageNet ResNet; None to detect it.

    Raises:
        InputError: unknown network; the message lists missing and unexpected tensors.
    """
    given = {name.removeprefix("module."): value for name, value in tensors.items()}
    if any(name.startswith(("resnet.", "rpn_")) for name in given):
        if style is not None:
            raise InputError(f"`style` {style}: this is a detector, only an ImageNet ResNet has a choice of styles")
        return _reference(given)
    return _resnet(given, style)


def _reference(given: dict[str, Tensor]) -> ConvertedWeights:
    depth = _depth(given, "resnet.")
    anchors = _rows(given, "rpn_cls_score_net.weight", 24) // 2
    name = {12: f"reference-c4-res{depth}", 15: f"reference-c4-res{depth}-lg"}.get(anchors, "")
    if name not in recipes.names():
        raise InputError(
            f"rpn_cls_score_net.weight: {anchors} anchors a cell with a ResNet-{depth} match no recipe; supported are "
            "12 (scales 4, 8, 16, 32) with 50, 101 and 152, and 15 (and scale 2) with 101"
        )
    masks = any(key.startswith("mask_") for key in given)
    classes = max(_rows(given, "cls_score_net.weight", 81) - 1, 1)
    if classes > MOST_CATEGORIES:
        raise InputError(f"cls_score_net.weight: {classes} classes, more than the limit of {MOST_CATEGORIES}")
    recipe = recipes.load(name).with_changes([] if masks else ["model.masks=false"])
    converted = _renamed(
        recipe,
        classes,
        given,
        REFERENCE_PARTS,
        ignored=tuple(f"resnet.{name}" for name in IMAGENET_CLASSIFIER),
        untrained=(),
    )
    kind = f"the reference's {'Mask' if masks else 'Faster'} R-CNN with a ResNet-{depth}, {anchors} anchors a cell"
    return ConvertedWeights(kind, recipe, classes, converted, ())


def _resnet(given: dict[str, Tensor], style: str | None) -> ConvertedWeights:
    depth = _depth(given, "")
    style = style or ("torchvision" if depth < 50 else _style(given))
    if style == "caffe":
        if depth < 50:
            raise InputError("`style='caffe'`: no recipe for a Caffe ResNet of fewer than 50 layers")
        recipe = recipes.load(f"reference-c4-res{depth}")
    else:
        name = f"c4-res{depth}" if f"c4-res{depth}" in recipes.names() else "c4-res101"
        recipe = recipes.load(name).with_changes([f"name=c4-res{depth}", f"model.depth={depth}", "model.norm=frozen"])
    tensors = _renamed(recipe, 0, given, RESNET_PARTS, ignored=IMAGENET_CLASSIFIER, untrained=HEADS)
    return ConvertedWeights(f"an ImageNet ResNet-{depth} in {style} style", recipe, None, tensors, HEADS)


def _depth(given: Mapping[str, Tensor], prefix: str) -> int:
    """Depth of the ResNet from its blocks, even if some of their tensors are missing."""
    blocks = tuple(_count(given, f"{prefix}layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = any(name.startswith(f"{prefix}layer") and ".conv3." in name for name in given)
    depths = [depth for depth, known in BLOCKS.items() if known == blocks and (depth >= 50) == bottleneck]
    if depths:
        return depths[0]
    needed = [f"{prefix}conv1.weight", *(f"{prefix}layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4))]
    raise InputError(
        "unknown network (supported are the reference's Mask or Faster R-CNN and ImageNet ResNets): "
        + _differences((n for n in needed if n not in given), (n for n in given if n not in needed))
        + (f"; blocks a stage: {', '.join(map(str, blocks))}" if any(blocks) else "")
    )


def _count(given: Mapping[str, Tensor], prefix: str) -> int:
    indices = {name[len(prefix) :].partition(".")[0] for name in given if name.startswith(prefix)}
    return len([index for index in indices if index.isdigit()])


def _rows(given: Mapping[str, Tensor], name: str, usual: int) -> int:
    """Length of the first axis of a tensor; `usual` if it is missing."""
    shape = given[name].shape if name in given else (usual,)
    return shape[0] if shape else 0


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


def _renamed(
    recipe: Recipe,
    classes: int,
    given: Mapping[str, Tensor],
    parts: Mapping[str, str],
    ignored: tuple[str, ...],
    untrained: tuple[str, ...],
) -> dict[str, Tensor]:
    """The tensors of a model of `recipe`, from `given` by `parts` (refdet's prefix -> the other program's)."""
    with torch.device("meta"):
        model = MaskRCNN(recipe, classes)
    wanted = {
        name: value for name, value in model.state_dict().items() if not (untrained and name.startswith(untrained))
    }
    found, missing, wrong, used = {}, [], [], set()
    for name, own in wanted.items():
        prefix = next(part for part in parts if name.startswith(part))
        source = parts[prefix] + name[len(prefix) :]
        if source not in given:
            missing.append(source)
            continue
        used.add(source)
        pairs = name.startswith("rpn.score.")
        shape = (2 * own.shape[0], *own.shape[1:]) if pairs else tuple(own.shape)
        if given[source].shape != shape:
            wrong.append(f"{source} is {tuple(given[source].shape)}, not {shape}")
            continue
        value = given[source].detach().float()
        if unusable({name: value}):
            wrong.append(f"{source} contains NaN, inf, values beyond {LARGEST_WEIGHT:g} or a negative variance")
        if pairs:  # softmax over the pair = sigmoid of the difference
            background, objects = value.chunk(2)
            value = objects - background
        found[name] = value.contiguous()
    left = [n for n in given if n not in used and n not in ignored and not n.endswith("num_batches_tracked")]
    if missing or left or wrong:
        raise InputError(
            f"looks like the weights of {recipe.name}, but "
            + "; ".join(filter(None, (_differences(missing, left), ", ".join(wrong[:5]))))
        )
    return found


def _differences(missing: Iterable[str], left: Iterable[str]) -> str:
    """Missing and unexpected tensors, the first names of each."""
    listed = []
    for what, names in (("missing", sorted(missing)), ("left over", sorted(left))):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            listed.append(f"{what}: {', '.join(map(cut, names[:8]))}{more}")
    return "; ".join(listed)
