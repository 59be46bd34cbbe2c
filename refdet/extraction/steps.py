"""Types of the functions that an extraction calls: to load an image, to compute a batch, and to finish it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.structures.regions import Regions

Load = Callable[[ImageRecord], np.ndarray]  # returns (H, W, 3) uint8 RGB
Finish = Callable[[], list[Regions]]  # returns the regions of each image of a batch
Compute = Callable[[list[ImageRecord], list[np.ndarray]], Finish]  # starts to compute a batch of loaded images
