"""`Source`: a store to export."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from refdet import store
from refdet.errors import InputError
from refdet.files.short_text import format_count
from refdet.structures.regions import Regions


class HeadMap(NamedTuple):
    """The feature map of an image that regions are pooled from.

    Attributes:
        values: (C, H, W) float32.
        im_info: (3,) float32 height, width and scale of the network input.
    """

    values: np.ndarray
    im_info: np.ndarray


class Source:
    """A complete store, open for reading, as a context manager.

    Args:
        path: the store.

    Attributes:
        path: the store.
        store: reader of the store.
        has_head_maps: whether the store has a `HeadMap` of each usable image.
        names: category id -> name, in the order of the detector's classes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = store.open(path)
        self.names = self.store.names
        self.has_head_maps = "head" in self.store.map_names
        self._head_map_sizes: dict[int, int] = {}
        if self.has_head_maps:
            sizes = np.diff(self.store.data["maps/head_start"][:])
            self._head_map_sizes = dict(zip(self.store, sizes.tolist(), strict=True))

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.store.close()

    def width(self, feature: str) -> int:
        """Length of the vectors of a feature.

        Args:
            feature: name of the feature.

        Returns:
            Number of values per region.

        Raises:
            InputError: the store lacks the feature, or it is not a vector.
        """
        available = self.store.feature_names
        if feature not in available:
            raise InputError(
                f"{self.path}: no feature {feature} (it has {', '.join(available) or 'none'}); "
                f"extract it with refdet extract-features --features {feature}"
            )
        shape = self.store.data[f"features/{feature}"].shape[1:]
        if len(shape) != 1:
            raise InputError(
                f"{self.path}: {feature} has shape {' x '.join(map(str, shape))} per region; "
                "export a vector such as fc7"
            )
        return int(shape[0])

    def read(self, image_id: int, features: Sequence[str], categories: bool = True) -> Regions:
        """Read and check the regions of an image.

        Args:
            image_id: the image.
            features: names of the features to read.
            categories: whether the category of every region must be in `names`.

        Returns:
            The regions.

        Raises:
            KeyError: unknown image.
            InputError: the store is damaged, a box or score is not finite, a mask is not text, or a category is
                unknown.
        """
        regions = self.store.read(image_id, features)
        where = f"{self.path}: image {image_id}"
        if not (np.isfinite(regions.boxes).all() and np.isfinite(regions.scores).all()):
            raise InputError(f"{where}: a box or score is not finite; extract it again")
        if not all(mask.isascii() for mask in regions.masks or ()):
            raise InputError(f"{where}: a mask is not a compressed RLE; extract it again")
        unknown = set(regions.category_ids.tolist()) - set(self.names)
        if categories and unknown:
            raise InputError(
                f"{where}: category {min(unknown)} is not among the {format_count(len(self.names), 'class')} of the "
                "store's detector, which this format needs; export regions it detected"
            )
        return regions

    def head_map_size(self, image_id: int) -> int:
        """Number of values in the head map of an image, 0 if it has none."""
        return self._head_map_sizes.get(image_id, 0)

    def read_head_map(self, image_id: int) -> HeadMap | None:
        """Read the head map of an image, None if it is unusable or not in the store, or the store has no maps."""
        if not self.head_map_size(image_id):
            return None
        regions = self.store.read(image_id, ("head",))
        assert regions.im_info is not None
        return HeadMap(regions.maps["head"].astype(np.float32), regions.im_info)

    def why_empty(self, image_id: int) -> str:
        """Why an image has no regions, "" if it has any."""
        if self.store.rows(image_id):
            return ""
        return self.store.errors.get(image_id) or "no regions"  # usable, but nothing was found

    def describe(self) -> dict[str, Any]:
        """File, hash, provenance and options of the store, for `provenance.json`."""
        return {
            "file": self.path.name,
            "sha256": self._sha256(),
            "provenance": self.store.provenance,
            "options": self.store.options,
            "recipe": self.store.recipe,
        }

    def _sha256(self) -> str:
        """SHA-256 of the open file, even if a repair has put another file at its path since it was opened."""
        digest, descriptor, offset = hashlib.sha256(), self.store.file.id.get_vfd_handle(), 0
        while block := os.pread(descriptor, 1 << 20, offset):
            digest.update(block)
            offset += len(block)
        return digest.hexdigest()
