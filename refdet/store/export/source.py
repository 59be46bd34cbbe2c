"""`Source`: a store that is exported, with its maps and the shapes of its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from refdet import store
from refdet.errors import InputError
from refdet.structures.provenance import file_sha256
from refdet.structures.regions import Regions


class Source:
    """A complete store, open for reading; use it in a ``with``.

    Attributes:
        path: the file.
        store: its reader.
        has_heads: whether it has the map that regions are pooled from (`head`).
        names: category id -> name, in the order of the detector's classes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = store.open(path)
        self.has_heads = "head" in self.store.map_names
        self._errors = self.store.errors
        try:
            self.names: dict[int, str] = {int(one["id"]): str(one["name"]) for one in self.store.classes}
            starts = self.store.data["maps/head_start"][:].tolist() if self.has_heads else []
        except (TypeError, KeyError, ValueError, OSError) as error:
            self.store.close()
            raise InputError(f"{path}: damaged: {error!r}; extract it again") from None
        ends = zip(starts[:-1], starts[1:], strict=True)
        self._head_sizes = dict(zip(self.store, (last - first for first, last in ends), strict=False))

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.store.close()

    def width(self, feature: str) -> int:
        """Numbers a region has of a feature. InputError if the store lacks it or has more than a vector of it."""
        there = self.store.feature_names
        if feature not in there:
            raise InputError(f"{self.path}: has no feature {feature}, but {', '.join(there) or 'none'}; "
                             f"extract it with refdet extract-features --features {feature}")  # fmt: skip
        shape = self.store.data[f"features/{feature}"].shape[1:]
        if len(shape) != 1:
            raise InputError(f"{self.path}: {feature} is {' x '.join(map(str, shape))} for a region; "
                             "this format takes vectors such as fc7")  # fmt: skip
        return int(shape[0])

    def read(self, image_id: int, features: Sequence[str], categories: bool = True) -> Regions:
        """The regions of an image.

        Args:
            image_id: KeyError for an image that is not in the store.
            features: those to read.
            categories: whether every category must be one of `names`.

        Raises:
            InputError: a box or score is not finite, a mask is no text, or a category is unknown.
        """
        regions = self.store.read(image_id, features)
        where = f"{self.path}: image {image_id}"
        if not (np.isfinite(regions.boxes).all() and np.isfinite(regions.scores).all()):
            raise InputError(f"{where}: a box or score is not finite; extract it again")
        if not all(mask.isascii() for mask in regions.masks or ()):
            raise InputError(f"{where}: a mask is not a compressed RLE; extract it again")
        unknown = set(regions.category_ids.tolist()) - set(self.names) if categories else set()
        if unknown:
            raise InputError(f"{where}: category {min(unknown)} is not one of the {len(self.names)} classes of the "
                             "store's detector, which this format numbers; export regions it detected")  # fmt: skip
        return regions

    def head_size(self, image_id: int) -> int:
        """How many numbers the `head` of an image has, 0 for an image without one."""
        return int(self._head_sizes.get(image_id, 0))

    def head(self, image_id: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The map regions are pooled from, (C, H, W) float32, and (height, width, scale) of the network's input.

        None for an image that has none, since it could not be used or is not in the store.
        """
        if not self.head_size(image_id):
            return None
        regions = self.store.read(image_id, ("head",))
        assert regions.im_info is not None
        return regions.maps["head"].astype(np.float32), regions.im_info

    def why_empty(self, image_id: int) -> str:
        """Why an image has no regions, "" if it has some."""
        if self.store.rows(image_id):
            return ""
        return self._errors.get(image_id) or "no regions"

    def describe(self) -> dict[str, Any]:
        """Which file this is and how it was computed, for the record of an export."""
        of = self.store
        return {"file": self.path.name, "sha256": file_sha256(self.path), "provenance": of.provenance,
                "options": of.options, "recipe": of.recipe}  # fmt: skip
