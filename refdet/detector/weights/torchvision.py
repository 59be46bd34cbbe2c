"""Mask and Faster R-CNN of torchvision with a ResNet and a pyramid, versions 1 and 2."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.detector.checkpoint import MAX_CATEGORIES
from refdet.detector.weights.conversion import (
    ConvertedWeights,
    NameMapping,
    convert_tensors,
    find_resnet_depth,
    num_rows,
    rename_tensors,
)
from refdet.errors import InputError

EPS = 1e-5  # of torchvision's norms and refdet's
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
# running variances of the norms after convolutions of the neck and heads, which only version 2 has
_FOLDABLE_NORM = re.compile(r"(backbone\.fpn\.\w+|roi_heads\.(box|mask)_head)\.\d\.1\.running_var$")


def is_detector(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of a torchvision detector."""
    return any(name.startswith("backbone.body.") for name in state_dict)


def identify(state_dict: Mapping[str, Tensor]) -> ConvertedWeights:
    """Identify a detector of torchvision and convert its weights.

    Raises:
        InputError: an unsupported head or backbone; the message says which, and what is supported.
    """
    if any(name.startswith("roi_heads.keypoint_") for name in state_dict):
        raise InputError(f"a torchvision Keypoint R-CNN, which cannot be imported; {SUPPORTED}")
    state_dict = _fold_norms(rename_tensors(state_dict, _current_name))
    is_version_2 = "roi_heads.box_head.0.0.weight" in state_dict
    depth = _depth(state_dict)
    changes = [] if any(name.startswith("roi_heads.mask_") for name in state_dict) else ["model.masks=false"]
    recipe = recipes.load("torchvision-fpn-res50-v2" if is_version_2 else "torchvision-fpn-res50")
    if depth != 50:
        changes += [f"name={recipe.name.replace('res50', f'res{depth}')}", f"model.depth={depth}"]
    recipe = recipe.with_changes(changes)
    classes = max(num_rows(state_dict, "roi_heads.box_predictor.cls_score.weight", 91) - 1, 1)
    if classes > MAX_CATEGORIES:
        raise InputError(f"cls_score.weight: {classes} classes, more than the limit of {MAX_CATEGORIES}")
    network, version = "Mask" if recipe.model.masks else "Faster", ", version 2" if is_version_2 else ""
    kind = f"torchvision's {network} R-CNN with a ResNet-{depth}{version}"
    tensors = convert_tensors(recipe, classes, state_dict, name_mapping(recipe))
    return ConvertedWeights(kind, recipe, classes, tensors, (), label_order="ids")


def name_mapping(recipe: Recipe) -> NameMapping:
    """Names in torchvision of the tensors of a network with a pyramid."""
    box, predictor, mask = "roi_heads.box_head.", "roi_heads.box_predictor.", "roi_heads.mask_predictor."
    convolutions = recipe.model.box_convs
    prefixes = {
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
    prefixes |= {f"rpn.more.{index}.": f"rpn.head.conv.{index + 1}.0." for index in range(recipe.model.rpn_convs - 1)}
    prefixes |= {f"head.convs.{index}.": f"{box}{index}.0." for index in range(convolutions)}
    for index in range(4):
        prefixes[f"head.mask.hidden.{2 * index}."] = f"roi_heads.mask_head.{index}.0."
        prefixes[f"neck.lateral.{index}."] = f"backbone.fpn.inner_blocks.{index}.0."
        prefixes[f"neck.output.{index}."] = f"backbone.fpn.layer_blocks.{index}.0."
    prefixes["backbone."] = "backbone.body."
    return NameMapping(prefixes, {})


def convert_eps(state_dict: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Adjust the weights of norms so that they compute the same with `EPS` as they did with `eps`."""
    converted = dict(state_dict)
    for name, value in state_dict.items():
        weight = f"{name.removesuffix('running_var')}weight"
        if name.endswith("running_var") and weight in state_dict and state_dict[weight].shape == value.shape:
            variance = value.double().clamp(min=0)
            scale = ((variance + EPS) / (variance + eps).clamp(min=1e-30)).sqrt()
            converted[weight] = (state_dict[weight].double() * scale).to(state_dict[weight].dtype)
    return converted


def unfold_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the biases of convolutions in the neck and heads to norms after them, as in version 2."""
    converted = {}
    for name, value in tensors.items():
        convolution, _, end = name.rpartition(".0.")
        if end != "bias" or not re.fullmatch(r"(backbone\.fpn\.\w+|roi_heads\.(box|mask)_head)\.\d", convolution):
            converted[name] = value
            continue
        ones = torch.ones_like(value)
        # a norm that only adds its bias
        norm = {"weight": (ones + EPS).sqrt(), "bias": value, "running_mean": 0 * ones, "running_var": ones}
        converted |= {f"{convolution}.1.{key}": tensor for key, tensor in norm.items()}
        converted[f"{convolution}.1.num_batches_tracked"] = torch.tensor(0)
    return converted


def _current_name(name: str) -> str:
    """The name of a tensor since torchvision 0.13."""
    for expression, replacement in _RENAMED:
        name = re.sub(expression, replacement, name)
    return name


def _fold_norms(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the norms of version 2's neck and heads into the convolutions before them, in float64."""
    converted = dict(state_dict)
    for name in state_dict:
        if not _FOLDABLE_NORM.match(name):
            continue
        norm = name.removesuffix("running_var")
        convolution = f"{norm.removesuffix('1.')}0."
        parts = [state_dict.get(norm + end) for end in ("weight", "bias", "running_mean", "running_var")]
        weight = state_dict.get(f"{convolution}weight")
        if weight is None or weight.dim() != 4 or any(p is None or p.shape != weight.shape[:1] for p in parts):
            continue  # `convert_tensors` reports the norm's tensors as unexpected
        scale, shift, mean, variance = (part.double() for part in parts if part is not None)
        scale = scale / (variance + EPS).sqrt()
        converted[f"{convolution}weight"] = (weight.double() * scale[:, None, None, None]).float()
        converted[f"{convolution}bias"] = (shift - mean * scale).float()
        for end in ("weight", "bias", "running_mean", "running_var"):
            del converted[norm + end]
    return converted


def _depth(state_dict: Mapping[str, Tensor]) -> int:
    """Depth of the backbone; raises InputError if it is not a ResNet of the standard width."""
    depth = find_resnet_depth(state_dict, "backbone.body.")
    if depth is None:
        raise InputError(f"a torchvision detector with a backbone other than a ResNet; {SUPPORTED}")
    if state_dict.get("backbone.body.layer1.0.conv1.weight", torch.zeros(64)).shape[:1] != (64,):
        raise InputError(f"a torchvision detector with a ResNeXt or a wide ResNet; {SUPPORTED}")
    return depth
