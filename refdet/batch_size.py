"""How many images go through the detector together: what fits, and less where it did not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from refdet.data.coco import ImageRecord
from refdet.data.inputs import input_size
from refdet.detector.inference import DetectOptions, detect_batch
from refdet.shard_work import Compute, Finish

if TYPE_CHECKING:
    from refdet.trained import TrainedDetector

LARGEST = {"cpu": 4, "cuda": 32}  # beyond it nothing is gained
SHARE = 0.8  # of the free memory; the rest is for what differs between images, and for other processes
CPU_BYTES = 2**30  # of an image of 600x1000 through the largest network, with room to spare


def fitting_batch_size(detector: TrainedDetector, records: Sequence[ImageRecord], options: DetectOptions) -> int:
    """A power of 2: as many images as the device of a detector has memory for, by the largest input of `records`.

    On a GPU it is measured: a batch of one image and one of two, of noise, each at its peak.
    """
    device = next(detector.model.parameters()).device
    most = LARGEST.get(device.type, 1)
    if device.type != "cuda":
        return _power_of_2(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * SHARE / CPU_BYTES, most)
    sizes = [(input_size(r.height, r.width, detector.meta.recipe.input), r) for r in records]
    largest = max(sizes, key=lambda pair: pair[0].height * pair[0].width)[1]
    image = np.random.default_rng(0).integers(0, 256, (largest.height, largest.width, 3), dtype=np.uint8)
    peaks = []
    for count in (1, 2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        detect_batch(detector.model, [image] * count, [largest] * count, detector.meta.category_ids, options)
        peaks.append(torch.cuda.max_memory_allocated(device))
    held = torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    return _power_of_2((free * SHARE - (peaks[0] - held)) / max(peaks[1] - peaks[0], 1) + 1, most)


def _power_of_2(count: float, most: int) -> int:
    size = 1
    while size * 2 <= min(count, most):
        size *= 2
    return size


def halving(compute: Compute) -> Compute:
    """`compute` for batches of any size: one for which a GPU has too little memory is cut into halves.

    Raises:
        torch.cuda.OutOfMemoryError: also one image is too much.
    """

    def each_half(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        try:
            return compute(batch, images)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        # outside of the handler, whose traceback holds the tensors
        torch.cuda.empty_cache()
        half = len(batch) // 2
        first, second = each_half(batch[:half], images[:half]), each_half(batch[half:], images[half:])
        return lambda: first() + second()

    return each_half
