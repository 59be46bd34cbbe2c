"""Mask and Faster R-CNN of torchvision with a ResNet and a pyramid, in both of its versions."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.detector.checkpoint import MAX_CATEGORIES
from refdet.detector.resnet import BLOCKS
from refdet.detector.weights.fitting import ConvertedWeights, Naming, count, fit, rows
from refdet.errors import InputError

EPS = 1e-5  # of its norms, and of refdet's
COCO_IDS = 90  # the labels of its COCO models are category ids, with gaps
SUPPORTED = "supported are Mask and Faster R-CNN with a ResNet and a pyramid"
# names before torchvision 0.13 -> names since then
_RENAMED = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^roi_heads\.mask_head\.mask_fcn1\.", "roi_heads.mask_head.0.0."),
    (r"^roi_heads\.mask_head\.mask_fcn2\.", "roi_heads.mask_head.1.0."),
    (r"^roi_heads\.mask_head\.mask_fcn3\.", "roi_heads.mask_head.2.0."),
    (r"^roi_heads\.mask_head\.mask_fcn4\.", "roi_heads.mask_head.3.0."),
)
_FOLDED = re.compile(r"(backbone\.fpn\.\w+|roi_heads\.(box|mask)_head)\.\d\.1\.running_var$")


def is_detector(given: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of a torchvision detector."""
    return any(name.startswith("backbone.body.") for name in given)


def identify(given: Mapping[str, Tensor]) -> ConvertedWeights:
    """Identify a detector of torchvision.

    Raises:
        InputError: another head or backbone; the message says which and what is supported.
    """
    if any(name.startswith("roi_heads.keypoint_") for name in given):
        raise InputError(f"a torchvision Keypoint R-CNN, which cannot be imported; {SUPPORTED}")
    given = _with_folded_norms({_current(name): value for name, value in given.items()})
    newer = "roi_heads.box_head.0.0.weight" in given
    depth = _depth(given)
    changes = [] if any(name.startswith("roi_heads.mask_") for name in given) else ["model.masks=false"]
    recipe = recipes.load("torchvision-fpn-res50-v2" if newer else "torchvision-fpn-res50")
    if depth != 50:
        changes += [f"name={recipe.name.replace('res50', f'res{depth}')}", f"model.depth={depth}"]
    recipe = recipe.with_changes(changes)
    classes = max(rows(given, "roi_heads.box_predictor.cls_score.weight", 91) - 1, 1)
    if classes > MAX_CATEGORIES:
        raise InputError(f"cls_score.weight: {classes} classes, more than the limit of {MAX_CATEGORIES}")
    kind = f"torchvision's {'Mask' if recipe.model.masks else 'Faster'} R-CNN with a ResNet-{depth}"
    tensors = fit(recipe, classes, given, naming(recipe))
    return ConvertedWeights(kind + ", version 2" * newer, recipe, classes, tensors, (), classes == COCO_IDS)


def naming(recipe: Recipe) -> Naming:
    """Names of torchvision for a network of refdet with a pyramid."""
    box, predictor, mask = "roi_heads.box_head.", "roi_heads.box_predictor.", "roi_heads.mask_predictor."
    convolutions = recipe.model.box_convs
    parts = {
        "rpn.conv.": "rpn.head.conv.0.0.",
        "rpn.score.": "rpn.head.cls_logits.",
        "rpn.delta.": "rpn.head.bbox_pred.",
        "head.box.score.": f"{predictor}cls_score.",
        "head.box.delta.": f"{predictor}bbox_pred.",
        "head.fc6.": f"{box}{convolutions + 1}." if convolutions else f"{box}fc6.",
        "head.fc7.": f"{box}fc7.",
        "head.mask.hidden.8.": f"{mask}conv5_mask.",
        "head.mask.logits.": f"{mask}mask_fcn_logits.",
    }
    parts |= {f"rpn.more.{index}.": f"rpn.head.conv.{index + 1}.0." for index in range(recipe.model.rpn_convs - 1)}
    parts |= {f"head.convs.{index}.": f"{box}{index}.0." for index in range(convolutions)}
    for index in range(4):
        parts[f"head.mask.hidden.{2 * index}."] = f"roi_heads.mask_head.{index}.0."
        parts[f"neck.lateral.{index}."] = f"backbone.fpn.inner_blocks.{index}.0."
        parts[f"neck.output.{index}."] = f"backbone.fpn.layer_blocks.{index}.0."
    parts["backbone."] = "backbone.body."
    return Naming(parts, {})


def with_usual_eps(given: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """The same network with `EPS` in its norms, from one whose norms were computed with another one."""
    found = dict(given)
    for name, value in given.items():
        weight = f"{name.removesuffix('running_var')}weight"
        if name.endswith("running_var") and weight in given and given[weight].shape == value.shape:
            variance = value.double().clamp(min=0)
            scale = ((variance + EPS) / (variance + eps).clamp(min=1e-30)).sqrt()
            found[weight] = (given[weight].double() * scale).to(given[weight].dtype)
    return found


def with_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Version 2's tensors from those whose norms in the neck and the heads are folded: norms that only add the bias."""
    found = {}
    for name, value in tensors.items():
        convolution, _, end = name.rpartition(".0.")
        if not re.fullmatch(r"(backbone\.fpn\.\w+|roi_heads\.(box|mask)_head)\.\d", convolution):
            found[name] = value
            continue
        if end == "weight":
            found[name] = value
            continue
        ones = torch.ones_like(value)
        norm = {"weight": (ones + EPS).sqrt(), "bias": value, "running_mean": 0 * ones, "running_var": ones}
        found |= {f"{convolution}.1.{key}": tensor for key, tensor in norm.items()}
        found[f"{convolution}.1.num_batches_tracked"] = torch.tensor(0)
    return found


def _current(name: str) -> str:
    for expression, replacement in _RENAMED:
        name = re.sub(expression, replacement, name)
    return name


def _with_folded_norms(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without version 2's norms in the neck and the heads: in the convolutions before them, computed in float64."""
    found = dict(given)
    for name in given:
        if not _FOLDED.match(name):
            continue
        norm = name.removesuffix("running_var")
        convolution = f"{norm.removesuffix('1.')}0."
        parts = [given.get(norm + end) for end in ("weight", "bias", "running_mean", "running_var")]
        weight = given.get(f"{convolution}weight")
        if weight is None or weight.dim() != 4 or any(p is None or p.shape != weight.shape[:1] for p in parts):
            continue  # reported as left over
        scale, shift, mean, variance = (part.double() for part in parts if part is not None)
        scale = scale / (variance + EPS).sqrt()
        found[f"{convolution}weight"] = (weight.double() * scale[:, None, None, None]).float()
        found[f"{convolution}bias"] = (shift - mean * scale).float()
        for end in ("weight", "bias", "running_mean", "running_var"):
            del found[norm + end]
    return found


def _depth(given: Mapping[str, Tensor]) -> int:
    blocks = tuple(count(given, f"backbone.body.layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = "backbone.body.layer1.0.conv3.weight" in given
    depths = [depth for depth, known in BLOCKS.items() if known == blocks and (depth >= 50) == bottleneck]
    if not depths:
        raise InputError(f"a torchvision detector with another backbone than a ResNet; {SUPPORTED}")
    if given.get("backbone.body.layer1.0.conv1.weight", torch.zeros(64)).shape[:1] != (64,):
        raise InputError(f"a torchvision detector with a ResNeXt or a wide ResNet; {SUPPORTED}")
    return depths[0]
