"""Types of the functions that an extraction calls: to load an image, to compute a batch, and to finish it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.structures.regions import Regions

Stamp = tuple[int, ...]  # CRC-32 of an image file and what changes if it is replaced; () if unknown
Load = Callable[[ImageRecord], np.ndarray]  # loads an image as (H, W, 3) uint8 RGB
Finish = Callable[[], list[Regions]]  # waits for a batch to be computed, and returns the regions of each of its images
Compute = Callable[[list[ImageRecord], list[np.ndarray]], Finish]  # starts computing a batch of loaded images


def no_stamp(image_id: int) -> Stamp:
    """The stamp of an image about whose file nothing is known."""
    return ()
