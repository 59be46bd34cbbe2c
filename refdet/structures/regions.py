"""`Regions`: the regions of one image, as the detector outputs and the store holds them.

Shape shorthand in this module:

    n: regions of the image
    C, H, W: channels, height and width of a feature map
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refdet.errors import ArgumentError
from refdet.files.short_text import format_count

if TYPE_CHECKING:
    from PIL import Image


NO_CATEGORY = -1
"""Category id of a region without a category."""


@dataclass(frozen=True, repr=False)
class Regions:
    """The regions of one image.

    Attributes:
        image_id: COCO image id.
        file_name: file name from the instances JSON ("" if unknown).
        height: height of the original image in pixels.
        width: width of the original image in pixels.
        boxes: (n, 4) float32, half-open ``x1 y1 x2 y2`` in pixels of the original image.
        scores: (n,) float32: 0..1 for detections, 1 for annotations, any finite value for boxes from a file.
        category_ids: (n,) int64, COCO category ids; `NO_CATEGORY` for boxes without one.
        ann_ids: (n,) int64 annotation ids, or None for detections.
        masks: n COCO compressed RLE ``counts`` (bytes) of full-image masks, or None.
        features: name -> (n, C) array, or (n, C, 7, 7) for spatial features.
        error: why the image could not be used, "" if it could; an image with an error has no regions.
        maps: name -> (C, H, W) array: "head" is the feature map that boxes are pooled from.
        im_info: (3,) float32: height and width of the network's input in pixels, and its vertical scale, input height /
            image height. None without maps.
        names: category id -> name, for the labels of `draw`; None if unknown. Neither compared nor stored.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray
    ann_ids: np.ndarray | None = None
    masks: tuple[bytes, ...] | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    error: str = ""
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    im_info: np.ndarray | None = None
    names: Mapping[int, str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        n = len(self.boxes)
        columns = {"scores": self.scores, "category_ids": self.category_ids, **self.features}
        if self.ann_ids is not None:
            columns["ann_ids"] = self.ann_ids
        if self.masks is not None:
            columns["masks"] = self.masks  # type: ignore[assignment]
        if self.boxes.shape != (n, 4):
            raise ValueError(f"boxes must be (n, 4), got {self.boxes.shape}")
        mismatched = {name: len(column) for name, column in columns.items() if len(column) != n}
        if mismatched:
            raise ValueError(f"image {self.image_id}: {format_count(n, 'box')}, but {mismatched}")
        invalid_maps = {name: values.shape for name, values in self.maps.items() if values.ndim != 3}
        if invalid_maps:
            raise ValueError(f"image {self.image_id}: maps must be (C, H, W), got {invalid_maps}")
        if self.im_info is None and self.maps:
            raise ValueError(f"image {self.image_id}: maps without im_info")
        if self.im_info is not None and (self.im_info.shape != (3,) or self.im_info.dtype != np.float32):
            raise ValueError(
                f"image {self.image_id}: im_info must be (3,) float32, got {self.im_info.shape} {self.im_info.dtype}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        parts = [format_count(len(self), "region")]
        if self.error:
            parts.append(f"error {self.error!r:.60}")
        if self.masks is not None:
            parts.append("masks")
        arrays = [*self.features.items(), *self.maps.items()]
        parts += [f"{name} {'x'.join(map(str, values.shape))} {values.dtype}" for name, values in arrays]
        name = f" {self.file_name!r:.60}" if self.file_name else ""
        return f"Regions(image {self.image_id}{name}, {self.width}x{self.height}: {', '.join(parts)})"

    def rles(self) -> list[dict]:
        """The masks as pycocotools RLE objects ``{"size": [height, width], "counts": bytes}``."""
        size = [self.height, self.width]
        return [{"size": size, "counts": counts} for counts in self.masks or ()]

    def score_at_least(self, min_score: float) -> np.ndarray:
        """Whether the score of each region is at least ``min_score``, (n,) bool.

        The threshold is rounded to float32, as scores are, so that a stored score of 0.7 (0.69999999 as a Python float)
        reaches a threshold of 0.7.

        Args:
            min_score: the threshold.

        Raises:
            ArgumentError: the threshold is NaN, which no score reaches.
        """
        if math.isnan(min_score):
            raise ArgumentError("min_score", "must be a number, not nan")
        return np.asarray(self.scores >= np.float32(min_score))

    def to_coco(self) -> list[dict[str, Any]]:
        """The regions as entries of a COCO results JSON.

        Examples:
            >>> regions.to_coco()[0].keys()
            dict_keys(['image_id', 'category_id', 'bbox', 'score', 'segmentation'])

        Returns:
            For each region "image_id", "category_id", "bbox" (``[x, y, width, height]`` in pixels of the original
            image), "score" and, with masks, "segmentation", an RLE whose ``counts`` are text.
        """
        boxes = self.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        results: list[dict[str, Any]] = [
            {"image_id": self.image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(
                self.category_ids.tolist(), boxes.tolist(), self.scores.tolist(), strict=True
            )
        ]
        if self.masks is not None:
            for result, counts in zip(results, self.masks, strict=True):
                result["segmentation"] = {"size": [self.height, self.width], "counts": counts.decode("ascii")}
        return results

    def draw(
        self,
        image: np.ndarray | Image.Image | str | Path,
        *,
        min_score: float | None = None,
        max_regions: int | None = None,
        names: Mapping[int, str] | None = None,
        exif: str = "ignore",
    ) -> Image.Image:
        """A copy of the image with boxes, translucent masks and labels drawn on it; notebooks display it.

        Labels never cover more than a third of the image: on a small image, only the highest-scoring regions are
        labeled, and a note in the log says how many are not.

        Examples:
            >>> regions.draw(image, min_score=0.3).save("regions.png")

        Args:
            image: the image of the regions: (H, W, 3) uint8 RGB, a PIL image or a path. PIL itself turns a TIFF by its
                EXIF orientation, so give the path of a TIFF unless the detector was given the PIL image too.
            min_score: lowest score of a region to draw; None for no limit.
            max_regions: maximum number of regions to draw, highest scores first; None for all.
            names: category id -> name for the labels; by default those of the detector or the store.
            exif: what to do with the EXIF orientation of a file: "ignore", as the detector does, or "apply" for regions
                of a store that was extracted so.

        Raises:
            ArgumentError: ``image`` is not an image or has another size, ``min_score`` is NaN, ``max_regions`` is
                negative, or ``exif`` is unknown.
            InputError: the path is not a readable image file.
        """
        from pycocotools import mask as coco_mask

        from refdet.structures.drawing import DrawnRegion, draw_regions
        from refdet.structures.pixels import read_stored_pixels, rgb_pixels

        if max_regions is not None and max_regions < 0:
            raise ArgumentError("max_regions", f"must be 0 or more, not {max_regions}")
        if exif not in ("ignore", "apply"):
            raise ArgumentError("exif", f"must be ignore or apply, not {exif!r}")
        pixels = rgb_pixels(read_stored_pixels(image, exif) if isinstance(image, str | Path) else image)
        height, width = pixels.shape[:2]
        if (height, width) != (self.height, self.width):
            raise ArgumentError(
                "image",
                f"is {width}x{height}, but the regions are of an image of {self.width}x{self.height}; give that image",
            )
        category_names = names if names is not None else self.names or {}
        rles, drawn = self.rles(), []
        best_first = np.argsort(-self.scores, kind="stable")
        if min_score is not None:
            best_first = best_first[self.score_at_least(min_score)[best_first]]
        for row in best_first[:max_regions].tolist():
            category = int(self.category_ids[row])
            name = category_names.get(category, "" if category == NO_CATEGORY else str(category))
            x1, y1, x2, y2 = self.boxes[row].tolist()
            mask = np.asarray(coco_mask.decode(rles[row])) if rles else None
            drawn.append(DrawnRegion((x1, y1, x2, y2), f"{name} {self.scores[row]:.2f}".strip(), mask))
        return draw_regions(pixels, drawn)

    @classmethod
    def empty(cls, image_id: int, file_name: str, height: int, width: int, error: str = "") -> Regions:
        """The regions of an image that has none; ``error`` says why, or is "" if there is no error."""
        return cls(
            image_id,
            file_name,
            height,
            width,
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            error=error,
        )
