"""Detectors and ImageNet backbones of detectron2, and Caffe2's ImageNet backbones.

Supported are Mask and Faster R-CNN of its model zoo with ResNet-50 and 101, as C4, DC5 and FPN. The network is inferred
from the names and shapes of its tensors. The position of the stride inside a block and the preprocessing are not in the
file; those of the zoo's models are assumed.
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
from refdet.detector.weights.fitting import (
    BackgroundLast,
    ConvertedWeights,
    Layout,
    Naming,
    NoBackground,
    SizesOuter,
    count,
    fit,
    rows,
)
from refdet.errors import InputError

_IGNORED = re.compile(r"pixel_(mean|std)$|(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+$")
_OTHER_HEADS = {
    "roi_heads.keypoint_head.": "a detectron2 Keypoint R-CNN",
    "sem_seg_head.": "a detectron2 Panoptic FPN",
    "roi_heads.box_head.0.": "a detectron2 Cascade R-CNN",
    "roi_heads.box_predictor.0.": "a detectron2 Cascade R-CNN",
}
_MORE_NORMS = re.compile(r"backbone\.fpn_\w+\.norm\.|roi_heads\.(box|mask)_head\.\w+\.norm\.")
_SCORES = "roi_heads.box_predictor.cls_score.weight"
SUPPORTED = "supported are Mask and Faster R-CNN with ResNet-50 or 101 as C4, DC5 or FPN"
_CAFFE2 = (
    (r"^res_conv1_bn_", "stem.conv1.norm."),
    (r"^conv1_", "stem.conv1."),
    (r"^(res\d)_(\d+)_branch1_bn_", r"\1.\2.shortcut.norm."),
    (r"^(res\d)_(\d+)_branch1_", r"\1.\2.shortcut."),
    (r"^(res\d)_(\d+)_branch2([abc])_bn_", r"\1.\2.conv\3.norm."),
    (r"^(res\d)_(\d+)_branch2([abc])_", r"\1.\2.conv\3."),
)
_CAFFE2_LETTERS = {"a": "1", "b": "2", "c": "3"}
_CAFFE2_ENDS = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def is_detector(given: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of a detectron2 detector."""
    return any(name.startswith(("proposal_generator.", "backbone.bottom_up.", "backbone.res2.")) for name in given)


def identify(given: Mapping[str, Tensor]) -> ConvertedWeights:
    """Recognise a detector of the model zoo, and convert its weights.

    Raises:
        InputError: another head or backbone; the message says which and what is supported.
    """
    for prefix, what in _OTHER_HEADS.items():
        if any(name.startswith(prefix) for name in given):
            raise InputError(f"{what}, which cannot be imported; {SUPPORTED}")
    if not any(name.startswith("proposal_generator.") for name in given):
        raise InputError(f"a detectron2 network without proposals, such as RetinaNet; {SUPPORTED}")
    if any(_MORE_NORMS.match(name) for name in given):
        raise InputError(f"a detectron2 detector with norms in its pyramid or heads (GN or SyncBN); {SUPPORTED}")
    if rows(given, "roi_heads.box_predictor.bbox_pred.weight", 0) == 4 < rows(given, _SCORES, 2) * 4 - 4:
        raise InputError(f"a detectron2 detector with one box for all classes (CLS_AGNOSTIC_BBOX_REG); {SUPPORTED}")
    pyramid = any(name.startswith("backbone.fpn_") for name in given)
    backbone = "backbone.bottom_up." if pyramid else "backbone."
    neck = "fpn" if pyramid else "c4" if any(name.startswith("roi_heads.res5.") for name in given) else "dc5"
    last = "roi_heads.res5." if neck == "c4" else f"{backbone}res5."
    recipe = recipes.load(f"d2-{neck}-res{_depth(given, backbone, last)}")
    masks = any(name.startswith("roi_heads.mask_head.") for name in given)
    recipe = recipe if masks else recipe.with_changes(["model.masks=false"])
    classes = max(rows(given, _SCORES, 81) - 1, 1)
    if classes > MAX_CATEGORIES:
        raise InputError(f"cls_score.weight: {classes} classes, more than the limit of {MAX_CATEGORIES}")
    ignored = [name for name in given if _IGNORED.match(name)]
    tensors = fit(recipe, classes, given, naming(recipe), ignored)
    kind = f"detectron2's {'Mask' if masks else 'Faster'} R-CNN with a ResNet-{recipe.model.depth} as {neck.upper()}"
    return ConvertedWeights(kind, recipe, classes, tensors, ())


def naming(recipe: Recipe) -> Naming:
    """detectron2's names for a network of refdet."""
    model = recipe.model
    box, mask = "roi_heads.box_predictor.", "roi_heads.mask_head."
    parts = {
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
        parts["head.mask.hidden.0."] = f"{mask}deconv."
    else:
        parts |= {f"head.mask.hidden.{2 * index}.": f"{mask}mask_fcn{index + 1}." for index in range(4)}
        parts["head.mask.hidden.8."] = f"{mask}deconv."
    backbone = "backbone.bottom_up." if model.neck == "fpn" else "backbone."
    for level in range(4):
        parts[f"neck.lateral.{level}."] = f"backbone.fpn_lateral{level + 2}."
        parts[f"neck.output.{level}."] = f"backbone.fpn_output{level + 2}."
        parts[f"backbone.layer{level + 1}."] = f"{backbone}res{level + 2}."
    parts["backbone."] = f"{backbone}stem."
    sizes = 1 if model.neck == "fpn" else len(model.anchor_sizes)
    anchors = SizesOuter(sizes, len(model.anchor_ratios))
    layouts: dict[str, Layout] = {
        "rpn.score.": anchors,
        "rpn.delta.": anchors,
        "head.box.score.": BackgroundLast(),
        "head.box.delta.": NoBackground(4),
        "head.mask.logits.": NoBackground(1),
    }
    return Naming(parts, layouts, _in_block)


def _in_block(name: str) -> str:
    """A name inside a ResNet: torchvision's ``bn1`` is detectron2's ``conv1.norm``."""
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"(^|\.)bn(\d)\.", r"\1conv\2.norm.", name)


def _depth(given: Mapping[str, Tensor], backbone: str, last: str) -> int:
    blocks = (*(count(given, f"{backbone}res{stage}.") for stage in (2, 3, 4)), count(given, last))
    depth = next((depth for depth in (50, 101) if BLOCKS[depth] == blocks), None)
    if depth is None or f"{backbone}stem.conv1.weight" not in given:
        raise InputError(f"a detectron2 detector with another backbone ({_blocks(blocks)}); {SUPPORTED}")
    shape = given.get(f"{backbone}res2.0.conv1.weight", torch.zeros(0)).shape
    if shape[:1] != (64,):
        raise InputError(f"a detectron2 detector with a ResNeXt or another width; {SUPPORTED}")
    return depth


def _blocks(blocks: tuple[int, ...]) -> str:
    return f"blocks per stage: {', '.join(map(str, blocks))}" if any(blocks) else "no ResNet"


def is_backbone(given: Mapping[str, Tensor]) -> bool:
    """Whether tensors are an ImageNet backbone in the names of detectron2 or Caffe2."""
    return {"stem.conv1.weight", "res2.0.conv1.weight"} <= set(given) or {"conv1_w", "res2_0_branch2a_w"} <= set(given)


def in_torchvision_names(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ImageNet backbone in torchvision's names.

    Caffe2's files hold scales and shifts only; mean 0 and variance 1 are filled in, as detectron2 does.
    """
    found = {}
    for name, value in given.items():
        name = _from_caffe2(name)
        if name.startswith("stem.fc.") or name.endswith("_momentum"):  # the classifier, and momentum of Caffe2's solver
            continue
        name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name.removeprefix("stem."))
        name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        name = re.sub(r"^res(\d)\.", lambda stage: f"layer{int(stage[1]) - 1}.", name)
        found[name] = value
    for name, value in list(found.items()):
        norm, _, end = name.rpartition(".")
        if end == "bias" and ("bn" in norm or norm.endswith("downsample.1")):
            found.setdefault(f"{norm}.running_mean", torch.zeros_like(value))
            found.setdefault(f"{norm}.running_var", torch.ones_like(value))
    return found


def _from_caffe2(name: str) -> str:
    """detectron2's name of a tensor of Caffe2; other names unchanged."""
    if name in ("fc1000_w", "fc1000_b", "pred_w", "pred_b"):
        return "stem.fc.classifier"
    for expression, replacement in _CAFFE2:
        changed, done = re.subn(expression, replacement, name)
        if done:
            changed = re.sub(r"conv([abc])\.", lambda found: f"conv{_CAFFE2_LETTERS[found[1]]}.", changed)
            start, _, end = changed.rpartition(".")
            return f"{start}.{_CAFFE2_ENDS.get(end, end)}"
    return name
