"""Types of the functions that an extraction is made of: loading an image, computing a batch, finishing it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.structures.regions import Regions

Load = Callable[[ImageRecord], np.ndarray]
Finish = Callable[[], list[Regions]]
Compute = Callable[[list[ImageRecord], list[np.ndarray]], Finish]
