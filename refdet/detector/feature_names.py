"""Names of the features that a detector computes, and which detector has which; without torch."""

from __future__ import annotations

from collections.abc import Sequence

from refdet.config.recipe import Recipe
from refdet.errors import ArgumentError

FEATURES = ("pool5", "fc7", "class_prob")
SPATIAL = ("spatial_pool5", "spatial_fc7")  # of a C4 network
HEAD = "head"  # the map itself: a feature of an image, not of its boxes


def check_features(names: Sequence[str], recipe: Recipe) -> None:
    """Check that a detector of this recipe has the features asked for.

    Raises:
        ArgumentError: no list, there is no such feature, or a pyramid does not have it.
    """
    if isinstance(names, str):
        raise ArgumentError("features", f"a list of names is needed, not {names!r}")
    every = (*FEATURES, *SPATIAL, HEAD)
    for name in names:
        if name not in every:
            raise ArgumentError("features", f"there is no {name!r}; choose from {', '.join(every)}")
        if name not in FEATURES and recipe.model.neck == "fpn":
            raise ArgumentError(
                "features",
                f"a detector with a feature pyramid has no {name!r}, only one with a C4 layout has; choose from "
                f"{', '.join(FEATURES)}, or take another detector",
            )


def of_regions(names: Sequence[str]) -> tuple[str, ...]:
    """The features among `names` that belong to regions."""
    return tuple(name for name in names if name != HEAD)
