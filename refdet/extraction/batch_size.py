"""Automatic batch size, and smaller batches after running out of memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from refdet.data.coco import ImageRecord
from refdet.data.transforms import input_size
from refdet.detector.predictor import detect_batch
from refdet.device import as_out_of_memory_error
from refdet.extraction.memory import available_bytes
from refdet.extraction.steps import Compute, Finish
from refdet.structures.detection_options import DetectionOptions

if TYPE_CHECKING:
    from refdet.detector.loading import TrainedDetector

MAX_BATCH_SIZE = {"cpu": 4, "cuda": 32}  # larger batches are not faster
MEMORY_FRACTION = 0.8  # of free memory; the rest is for variation between images and for other processes
CPU_IMAGE_BYTES = 2**30  # memory that an image of 600x1000 takes with the largest network, with a margin


def auto_batch_size(
    detector: TrainedDetector, records: Sequence[ImageRecord], options: DetectionOptions, features: Sequence[str]
) -> int:
    """The largest power of 2 images that fits into the memory of the detector's device, at most `MAX_BATCH_SIZE`.

    On a GPU the peak memory of one and of two random images of the largest size in `records` is measured, with a score
    threshold of 0 so that ``options.max_regions`` is reached.

    Raises:
        torch.cuda.OutOfMemoryError: even one image does not fit.
    """
    device = next(detector.model.parameters()).device
    limit = MAX_BATCH_SIZE.get(device.type, 1)
    if device.type != "cuda":
        return _power_of_2(available_bytes() * MEMORY_FRACTION / CPU_IMAGE_BYTES, limit)
    sizes = [(input_size(r.height, r.width, detector.meta.recipe.input), r) for r in records]
    largest = max(sizes, key=lambda pair: pair[0].height * pair[0].width)[1]
    image = np.random.default_rng(0).integers(0, 256, (largest.height, largest.width, 3), dtype=np.uint8)
    all_regions = replace(options, score_threshold=0.0)
    peaks = []
    for count in (1, 2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            ids = detector.meta.category_ids
            with as_out_of_memory_error():
                detect_batch(detector.model, [image] * count, [largest] * count, ids, all_regions, features=features)
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise
        else:
            peaks.append(torch.cuda.max_memory_allocated(device))
    torch.cuda.empty_cache()
    if len(peaks) == 1:
        return 1
    free, allocated = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_allocated(device)
    return _power_of_2((free * MEMORY_FRACTION - (peaks[0] - allocated)) / max(peaks[1] - peaks[0], 1) + 1, limit)


def _power_of_2(count: float, limit: int) -> int:
    size = 1
    while size * 2 <= min(count, limit):
        size *= 2
    return size


def split_on_oom(compute: Compute) -> Compute:
    """Wrap `compute` to halve a batch when the GPU runs out of memory, and later batches of that size right away.

    Failed allocations of cuBLAS and cuDNN count as PyTorch's own.

    Raises:
        torch.cuda.OutOfMemoryError: even one image does not fit.
    """
    failed_size = sys.maxsize  # size of the smallest batch that did not fit

    def compute_halves(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        nonlocal failed_size
        if len(batch) < failed_size:
            try:
                with as_out_of_memory_error():
                    return compute(batch, images)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                failed_size = len(batch)
            # outside the handler, whose traceback keeps the tensors alive
            torch.cuda.empty_cache()
        half = len(batch) // 2
        first, second = compute_halves(batch[:half], images[:half]), compute_halves(batch[half:], images[half:])
        return lambda: first() + second()

    return compute_halves
