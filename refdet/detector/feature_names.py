"""Names of the features that a detector computes. Does not import torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from refdet.config.recipe import Recipe
from refdet.errors import ArgumentError

CLASS_PROB = "class_prob"
VECTOR_FEATURES = ("pool5", "fc7", CLASS_PROB)
SPATIAL_FEATURES = ("spatial_pool5", "spatial_fc7")  # C4 networks only; a VGG has no spatial_fc7
FEATURE_MAP = "head"  # the feature map of the whole image, C4 networks only
# value of model.neck -> its name in messages
NECK_NAMES = {"c4": "a C4 head", "fpn": "a feature pyramid", "dc5": "a dilated conv5"}


def check_features(names: Sequence[str], recipe: Recipe) -> None:
    """Check that a detector of this recipe has these features.

    Raises:
        ArgumentError: `names` is not a list, or the detector does not have one of them.
    """
    if isinstance(names, str) or not isinstance(names, Collection):  # an iterator would be empty after this check
        raise ArgumentError("features", f"a list of names is needed, not {names!r}")
    all_names = (*VECTOR_FEATURES, *SPATIAL_FEATURES, FEATURE_MAP)
    for name in names:
        if name not in all_names:
            raise ArgumentError("features", f"unknown feature {name!r}; choose from {', '.join(all_names)}")
        if name not in VECTOR_FEATURES and recipe.model.neck != "c4":
            raise ArgumentError(
                "features",
                f"a detector with {NECK_NAMES[recipe.model.neck]} has no {name!r}, only one with a C4 head has; "
                f"choose from {', '.join(VECTOR_FEATURES)}, or take another detector",
            )
        if name == "spatial_fc7" and recipe.model.backbone == "vgg16":
            raise ArgumentError(
                "features",
                "a detector with a VGG-16 has no 'spatial_fc7', as its fc7 is a linear layer; choose from "
                f"{', '.join((*VECTOR_FEATURES, SPATIAL_FEATURES[0], FEATURE_MAP))}, or take another detector",
            )


def region_features(names: Sequence[str]) -> tuple[str, ...]:
    """The names without `FEATURE_MAP`, which is a feature of the image."""
    return tuple(name for name in names if name != FEATURE_MAP)
