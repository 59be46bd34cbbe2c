"""`Regions`: the regions of one image, the one thing that leaves the detector and enters the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Regions:
    """The n regions of one image.

    Attributes:
        image_id: COCO image id.
        file_name: name of the image file as the instances JSON gives it ("" if unknown).
        height, width: size of the original image in pixels.
        boxes: (n, 4) float32, half-open ``x1 y1 x2 y2`` in pixels of the original image.
        scores: (n,) float32 in 0..1, or what a file of given boxes says; 1 for regions that are annotations.
        category_ids: (n,) int64, COCO category ids.
        ann_ids: (n,) int64 annotation ids, or None for detections.
        masks: n COCO compressed RLE ``counts`` (bytes) of full-image masks, or None where there are none.
        features: name -> (n, ...) array, in the order of the boxes: (n, width), or (n, C, 7, 7) of spatial ones.
        error: "" or why this image has no regions.
        maps: name -> (C, H, W) array of the whole image: "head" is the map that boxes are pooled from.
        im_info: (3,) float32: height and width of the network's input in pixels, and the factor that made its height
            of the original image's; that of the width is the ratio of the widths. None where there are no maps.
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

    def __post_init__(self) -> None:
        n = len(self.boxes)
        columns = {"scores": self.scores, "category_ids": self.category_ids, **self.features}
        if self.ann_ids is not None:
            columns["ann_ids"] = self.ann_ids
        if self.masks is not None:
            columns["masks"] = self.masks  # type: ignore[assignment]
        if self.boxes.shape != (n, 4):
            raise ValueError(f"boxes must be (n, 4), got {self.boxes.shape}")
        wrong = {name: len(column) for name, column in columns.items() if len(column) != n}
        if wrong:
            raise ValueError(f"image {self.image_id}: {n} boxes, but {wrong}")
        flat = {name: values.shape for name, values in self.maps.items() if values.ndim != 3}
        if flat:
            raise ValueError(f"image {self.image_id}: maps must be (C, H, W), got {flat}")
        if self.im_info is None and self.maps:
            raise ValueError(f"image {self.image_id}: maps without im_info")
        if self.im_info is not None and (self.im_info.shape != (3,) or self.im_info.dtype != np.float32):
            raise ValueError(f"image {self.image_id}: im_info must be (3,) float32, got {self.im_info.shape} "
                             f"{self.im_info.dtype}")  # fmt: skip

    def __len__(self) -> int:
        return len(self.boxes)

    def rles(self) -> list[dict]:
        """The masks as pycocotools RLE objects ``{"size": [height, width], "counts": bytes}``."""
        size = [self.height, self.width]
        return [{"size": size, "counts": counts} for counts in self.masks or ()]

    @classmethod
    def empty(cls, image_id: int, file_name: str, height: int, width: int, error: str = "") -> Regions:
        """An image without regions, and why."""
        return cls(
            image_id, file_name, height, width,
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), error=error,
        )  # fmt: skip
