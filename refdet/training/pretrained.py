"""Training from pretrained weights: which parameters are loaded and which stay random. Imports torch only to load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refdet.config.recipe import Recipe
from refdet.detector import checkpoint
from refdet.detector.backbone_channels import network_name
from refdet.detector.feature_names import NECK_NAMES
from refdet.errors import InputError
from refdet.files.short_text import format_count
from refdet.structures.provenance import Provenance, file_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from refdet.detector.mask_rcnn import MaskRCNN

Categories = tuple[tuple[int, str], ...]  # (category id, name) of label 1, 2, ...

# prefixes of the layers that depend on the classes, which `train.reset_predictors` reinitializes
PREDICTORS = ("head.box.", "head.mask.logits.")
MASK_BRANCH = "head.mask."  # prefix of the mask branch
# options that change the inputs of a trained RPN or head, but not the shapes of its weights
DETECTOR_OPTIONS = (("model", "anchor_offset"), ("model", "torchvision_anchors"), ("model", "sampling_ratio"))


def find_new_prefixes(weights: Path, recipe: Recipe, categories: Categories) -> tuple[str, ...]:
    """Prefixes of the names of the parameters that pretrained weights do not provide, and which therefore start random.

    All others are loaded, such as the convolutions of an ImageNet network, or everything except the mask branch from a
    Faster R-CNN. Classes must be the same unless the layers that depend on them are reinitialized.

    Raises:
        InputError: the weights have other classes, another network or another input format.
    """
    pretrained = checkpoint.load_meta(weights)
    backbone_only = bool(pretrained.untrained)
    _check_network(pretrained.recipe, recipe, weights, backbone_only)
    _check_input_format(pretrained.recipe, recipe, weights, backbone_only)
    new_prefixes = pretrained.untrained
    if recipe.train.reset_predictors:
        new_prefixes += PREDICTORS
    if recipe.model.masks != pretrained.recipe.model.masks:
        new_prefixes += (MASK_BRANCH,)  # missing in one of the two
    if pretrained.categories != categories and not any("head.box.".startswith(prefix) for prefix in new_prefixes):
        raise InputError(
            f"`weights` {weights}: {describe_difference(pretrained.categories, categories)}; keep all but its last "
            "layers with `train.reset_predictors=true`"
        )
    if pretrained.recipe.model.neck != recipe.model.neck and backbone_only:
        new_prefixes += ("neck.", "head.")
    return new_prefixes


def with_pretrained_weights(provenance: Provenance, weights: Path) -> Provenance:
    """Record in a provenance that a run starts from the weights of a run directory."""
    folder = checkpoint.run_directory(weights)
    return provenance.with_weights(
        f"{folder.name} (sha256 {file_sha256(folder / checkpoint.MODEL)[:12]}; "
        f"{checkpoint.load_meta(folder).provenance.one_line()})"
    )


def load_pretrained(model: MaskRCNN, categories: Categories, weights: Path) -> tuple[str, ...]:
    """Load the weights of a run directory into a new model, except those that `find_new_prefixes` returns.

    Returns:
        The prefixes of `find_new_prefixes`.

    Raises:
        InputError: the weights have other classes, another network or another input format.
    """
    from refdet.detector.loading import load_weights

    folder = checkpoint.run_directory(weights)
    pretrained = checkpoint.load_meta(folder)
    new_prefixes = find_new_prefixes(weights, model.recipe, categories)
    tensors = checkpoint.read_weights(folder, pretrained)
    if pretrained.recipe.model.neck != model.recipe.model.neck and pretrained.untrained:
        tensors = _move_conv5_to_backbone(tensors)
    load_weights(model, tensors, folder / checkpoint.MODEL, skip=new_prefixes)
    return new_prefixes


def describe_difference(saved: Categories, current: Categories) -> str:
    """Describe for the user how the categories of a checkpoint and of an instances file differ."""
    if len(saved) != len(current):
        return f"the checkpoint has {format_count(len(saved), 'class')}, the instances file {len(current)}"
    first = next((a, b) for a, b in zip(saved, current, strict=True) if a != b)
    return f"the checkpoint has class {first[0]} where the instances file has {first[1]}"


def _move_conv5_to_backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move conv5 of an imported ResNet from the head, where a C4 network has it, to the backbone."""
    return {name.replace("head.conv5.", "backbone.layer4."): value for name, value in tensors.items()}


def _check_network(pretrained: Recipe, current: Recipe, weights: Path, backbone_only: bool) -> None:
    """Raise InputError for a different backbone, depth, width or neck.

    The shapes of the tensors would show this too, but the message is clearer.
    """
    keys = ["backbone", "width"]
    if current.model.backbone == "resnet":
        keys.append("depth")
    if not backbone_only:
        keys.append("neck")
    if any(getattr(pretrained.model, key) != getattr(current.model, key) for key in keys):
        raise InputError(
            f"`weights` {weights}: a {_network(pretrained)}, but recipe {current.name} has a {_network(current)}; "
            "choose another recipe or other weights"
        )


def _network(recipe: Recipe) -> str:
    """Human-readable name of a network, such as "ResNet-50 with a C4 head"."""
    model = recipe.model
    return network_name(model) + (f" with {NECK_NAMES[model.neck]}" if model.backbone == "resnet" else "")


def _check_input_format(pretrained: Recipe, current: Recipe, weights: Path, backbone_only: bool) -> None:
    """Raise InputError for a different input format, or another option that the shapes of tensors do not show."""
    fixes = []
    for part, key in (
        ("input", "order"),
        ("input", "mean"),
        ("input", "std"),
        ("model", "stride_in_1x1"),
        ("model", "pooler_resolution"),
        *(() if backbone_only else DETECTOR_OPTIONS),
    ):
        old, new = (getattr(getattr(options, part), key) for options in (pretrained, current))
        # this decides the stride of conv5, and matters only if both networks have a C4 head and it was trained
        if key == "pooler_resolution" and (backbone_only or {pretrained.model.neck, current.model.neck} != {"c4"}):
            continue
        if old != new:
            value = f"[{','.join(map(str, old))}]" if isinstance(old, tuple) else str(old).lower()
            fixes.append(f"`{part}.{key}={value}`")
    if fixes:
        raise InputError(f"`weights` {weights}: trained with other options than the recipe's; add {' '.join(fixes)}")
