"""Training from pretrained weights: which parameters are loaded and which start afresh. Torch only to load them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refdet.config.recipe import Recipe
from refdet.detector import checkpoint
from refdet.detector.backbones import network_name
from refdet.detector.feature_names import NECKS
from refdet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from refdet.detector.mask_rcnn import MaskRCNN

Categories = tuple[tuple[int, str], ...]  # (COCO id, name) of label 1, 2, ...

# layers that depend on the classes; `train.reset_predictors` reinitialises them
PREDICTORS = ("head.box.", "head.mask.logits.")
MASK_BRANCH = "head.mask."
# options that shift what a trained RPN or head sees, though its shapes stay the same
OF_DETECTORS = (("model", "anchor_offset"), ("model", "torchvision_anchors"), ("model", "sampling_ratio"))


def begins_anew(weights: Path, recipe: Recipe, categories: Categories) -> tuple[str, ...]:
    """Prefixes of the names of the parameters that pretrained weights do not provide.

    All trained parameters are loaded: the convolutions of an ImageNet network, or all but the mask branch of a Faster
    R-CNN. Classes must be the same unless the layers that depend on them are reinitialised.

    Raises:
        InputError: the weights have other classes, another network or another input format.
    """
    theirs = checkpoint.load_meta(weights)
    _check_network(theirs.recipe, recipe, weights, bool(theirs.untrained))
    _check_style(theirs.recipe, recipe, weights, bool(theirs.untrained))
    fresh = theirs.untrained
    if recipe.train.reset_predictors:
        fresh += PREDICTORS
    if recipe.model.masks != theirs.recipe.model.masks:
        fresh += (MASK_BRANCH,)  # missing in one of the two
    if theirs.categories != categories and not any("head.box.".startswith(part) for part in fresh):
        raise InputError(
            f"`weights` {weights}: {difference(theirs.categories, categories)}; keep all but its last layers with "
            "`train.reset_predictors=true`"
        )
    if theirs.recipe.model.neck != recipe.model.neck and theirs.untrained:
        fresh += ("neck.", "head.")
    return fresh


def load_pretrained(model: MaskRCNN, categories: Categories, weights: Path) -> tuple[str, ...]:
    """Load the weights of a run directory into a new model; returns the prefixes of `begins_anew`.

    Raises:
        InputError: the weights have other classes, another network or another input format.
    """
    from refdet.detector.loading import load_weights

    folder = checkpoint.run_directory(weights)
    theirs = checkpoint.load_meta(folder)
    fresh = begins_anew(weights, model.recipe, categories)
    tensors, _ = checkpoint.read_tensors(folder / checkpoint.MODEL)
    if theirs.recipe.model.neck != model.recipe.model.neck and theirs.untrained:
        tensors = _for_pyramid(tensors)
    load_weights(model, tensors, folder / checkpoint.MODEL, skip=fresh)
    return fresh


def difference(theirs: tuple, ours: tuple) -> str:
    """Human-readable difference between the categories of a checkpoint and of an instances file."""
    if len(theirs) != len(ours):
        return f"the checkpoint has {len(theirs)} classes, the instances file {len(ours)}"
    first = next((a, b) for a, b in zip(theirs, ours, strict=True) if a != b)
    return f"the checkpoint has class {first[0]} where the instances file has {first[1]}"


def _for_pyramid(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move conv5 of an imported ResNet from the head, as in a C4 network, to the backbone."""
    return {name.replace("head.conv5.", "backbone.layer4."): value for name, value in tensors.items()}


def _check_network(theirs: Recipe, ours: Recipe, weights: Path, backbone_alone: bool) -> None:
    """Raise InputError for another depth, width or neck, clearer than a list of mismatched tensors."""
    keys = ["backbone", "width"] + ["depth"] * (ours.model.backbone == "resnet") + ["neck"] * (not backbone_alone)
    if any(getattr(theirs.model, key) != getattr(ours.model, key) for key in keys):
        raise InputError(
            f"`weights` {weights}: a {_network(theirs)}, but recipe {ours.name} has a {_network(ours)}; choose another "
            "recipe or other weights"
        )


def _network(recipe: Recipe) -> str:
    model = recipe.model
    return network_name(model) + (f" with {NECKS[model.neck]}" if model.backbone == "resnet" else "")


def _check_style(theirs: Recipe, ours: Recipe, weights: Path, imported_resnet: bool) -> None:
    """Raise InputError for another input format or stride, which shapes do not show."""
    fixes = []
    for part, key in (
        ("input", "order"),
        ("input", "mean"),
        ("input", "std"),
        ("model", "stride_in_1x1"),
        ("model", "pooler_resolution"),
        *(() if imported_resnet else OF_DETECTORS),
    ):
        before, now = (getattr(getattr(recipe, part), key) for recipe in (theirs, ours))
        # the stride of conv5 on RoIs, if both have it and it was trained there
        if key == "pooler_resolution" and (imported_resnet or {theirs.model.neck, ours.model.neck} != {"c4"}):
            continue
        if before != now:
            value = f"[{','.join(map(str, before))}]" if isinstance(before, tuple) else str(before).lower()
            fixes.append(f"`{part}.{key}={value}`")
    if fixes:
        raise InputError(f"`weights` {weights}: trained in another style than the recipe's; add {' '.join(fixes)}")
