"""The start of a training from weights: what of them fits, and what begins anew. Torch only where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refdet.config.recipe import Recipe
from refdet.detector import checkpoint
from refdet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from refdet.detector.mask_rcnn import MaskRCNN

Categories = tuple[tuple[int, str], ...]  # (COCO id, name) of label 1, 2, ...

# layers that depend on the classes; `train.reset_predictors` starts them anew
PREDICTORS = ("head.box.", "head.mask.logits.")
MASK_BRANCH = "head.mask."


def begins_anew(weights: Path, recipe: Recipe, categories: Categories) -> tuple[str, ...]:
    """What of a training from weights begins anew: the beginnings of the names of its parameters.

    Taken is all that someone trained: of an imported ImageNet network its convolutions, of a Faster R-CNN all but the
    mask branch. Classes must agree, unless the layers that depend on them begin anew anyway.

    Raises:
        InputError: the weights are of other classes, or another style of input.
    """
    theirs = checkpoint.load_meta(weights)
    _check_network(theirs.recipe, recipe, weights, bool(theirs.untrained))
    _check_style(theirs.recipe, recipe, weights)
    fresh = theirs.untrained
    if recipe.train.reset_predictors:
        fresh += PREDICTORS
    if recipe.model.masks != theirs.recipe.model.masks:
        fresh += (MASK_BRANCH,)  # which is not there, or not wanted
    if theirs.categories != categories and not any("head.box.".startswith(part) for part in fresh):
        raise InputError(
            f"--weights {weights}: {difference(theirs.categories, categories)}; keep all but its last layers with "
            "--set train.reset_predictors=true"
        )
    if theirs.recipe.model.neck != recipe.model.neck and theirs.untrained:
        fresh += ("neck.", "head.")
    return fresh


def load_pretrained(model: MaskRCNN, categories: Categories, weights: Path) -> tuple[str, ...]:
    """Put the weights of a run directory into a new model; returns what `begins_anew`.

    Raises:
        InputError: see `begins_anew`; or the weights are of another network.
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
    """Where the categories of a checkpoint differ from those of an instances file, for people."""
    if len(theirs) != len(ours):
        return f"the checkpoint has {len(theirs)} classes, the instances file {len(ours)}"
    first = next((a, b) for a, b in zip(theirs, ours, strict=True) if a != b)
    return f"the checkpoint has class {first[0]} where the instances file has {first[1]}"


def _for_pyramid(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An imported ResNet, whose conv5 stands in the head of a C4 network, for one that has it in the backbone."""
    return {name.replace("head.conv5.", "backbone.layer4."): value for name, value in tensors.items()}


def _check_network(theirs: Recipe, ours: Recipe, weights: Path, backbone_alone: bool) -> None:
    """Another depth, width or neck would show as a list of tensors that do not fit."""
    keys = ("depth", "width") if backbone_alone else ("depth", "width", "neck")
    if any(getattr(theirs.model, key) != getattr(ours.model, key) for key in keys):
        raise InputError(
            f"--weights {weights}: a {_network(theirs)}; recipe {ours.name} wants a {_network(ours)}; choose a recipe "
            "that fits, or other weights"
        )


def _network(recipe: Recipe) -> str:
    model = recipe.model
    width = "" if model.width == 64 else f" of width {model.width}"
    return f"ResNet-{model.depth}{width} with {'a feature pyramid' if model.neck == 'fpn' else 'a C4 head'}"


def _check_style(theirs: Recipe, ours: Recipe, weights: Path) -> None:
    """Weights know the range and the order of the channels, and where the stride is, though no shape shows it."""
    mends = []
    for part, key in (
        ("input", "order"), ("input", "mean"), ("input", "std"), ("model", "stride_in_1x1"),
    ):  # fmt: skip
        before, now = (getattr(getattr(recipe, part), key) for recipe in (theirs, ours))
        if before != now:
            value = f"[{','.join(map(str, before))}]" if isinstance(before, tuple) else str(before).lower()
            mends.append(f"--set {part}.{key}={value}")
    if mends:
        raise InputError(f"--weights {weights}: trained in another style than the recipe's; add {' '.join(mends)}")
