"""Automatic batch size, and smaller batches after running out of memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from refdet.data.coco import ImageRecord
from refdet.data.transforms import input_size
from refdet.detector.predictor import start_detecting
from refdet.device import as_out_of_memory_error
from refdet.extraction.memory import available_bytes
from refdet.extraction.steps import Compute, Finish
from refdet.structures.detection_options import DetectionOptions

if TYPE_CHECKING:
    from refdet.detector.loading import TrainedDetector
    from refdet.detector.mask_rcnn import MaskRCNN

MAX_BATCH_SIZE = {"cpu": 4, "cuda": 32}  # larger batches are not faster
MEMORY_FRACTION = 0.8  # of free memory; the rest is for variation between images and for other processes
CPU_IMAGE_BYTES = 2**30  # memory per image on a CPU: an input of 600x1000 in the largest network, with a margin


@dataclass(frozen=True)
class MeasuredBatch:
    """A batch that fits into the memory of a GPU.

    Attributes:
        size: number of images.
        peak_bytes: most memory that a batch of the largest images takes, beyond what is allocated between batches.
    """

    size: int
    peak_bytes: int


def auto_batch_size(
    detector: TrainedDetector, records: Sequence[ImageRecord], options: DetectionOptions, features: Sequence[str]
) -> int:
    """Find the largest power of 2 of images that fit into the memory of the detector's device, up to `MAX_BATCH_SIZE`.

    On a GPU, `measure_batch_size` measures it; on a CPU, it is estimated from `CPU_IMAGE_BYTES`, and at least 1.

    Raises:
        torch.cuda.OutOfMemoryError: not even one image fits into the memory of the GPU.
    """
    device = next(detector.model.parameters()).device
    if device.type == "cuda":
        return measure_batch_size(detector, records, options, features).size
    return _power_of_2(available_bytes() * MEMORY_FRACTION / CPU_IMAGE_BYTES, MAX_BATCH_SIZE.get(device.type, 1))


def measure_batch_size(
    detector: TrainedDetector, records: Sequence[ImageRecord], options: DetectionOptions, features: Sequence[str]
) -> MeasuredBatch:
    """Find the largest batch whose measured peak is at most `MEMORY_FRACTION` of a GPU's free memory.

    Batches of 1, 2, 4, ... random images of the largest size in ``records`` are computed, with a score threshold of 0
    so that ``options.max_regions`` is reached. Memory need not grow evenly, so only a size that was measured is
    returned; the growth so far only decides whether the next size is tried. A single image is returned even if its peak
    is higher. The model's profiler does not count the time.

    Raises:
        torch.cuda.OutOfMemoryError: not even one image fits.
    """
    device = next(detector.model.parameters()).device
    sizes = [(input_size(r.height, r.width, detector.meta.recipe.input), r) for r in records]
    largest = max(sizes, key=lambda pair: pair[0].height * pair[0].width)[1]
    image = np.random.default_rng(0).integers(0, 256, (largest.height, largest.width, 3), dtype=np.uint8)
    all_regions = replace(options, score_threshold=0.0)

    def peak_bytes(count: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated, images = torch.cuda.memory_allocated(device), [image] * count
        ids = detector.meta.category_ids
        with as_out_of_memory_error(), _without_profiler(detector.model):
            start_detecting(detector.model, images, [largest] * count, ids, all_regions, features=features)
            torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated

    peak_bytes(1)  # warm up: libraries allocate memory that they keep
    peaks = [peak_bytes(1)]
    torch.cuda.empty_cache()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # in partly used blocks
    budget = (torch.cuda.mem_get_info(device)[0] + unused) * MEMORY_FRACTION
    size = 1
    while size < MAX_BATCH_SIZE["cuda"] and _expected_peak(peaks) <= budget:
        try:
            peak = peak_bytes(2 * size)
        except torch.cuda.OutOfMemoryError:
            break
        if peak > budget:
            break
        size *= 2
        peaks.append(peak)
    torch.cuda.empty_cache()
    return MeasuredBatch(size, peaks[-1])


@contextmanager
def _without_profiler(model: MaskRCNN) -> Iterator[None]:
    """Detach the profiler of a model within the block."""
    profiler, model.profiler = model.profiler, None
    try:
        yield
    finally:
        model.profiler = profiler


def _expected_peak(peaks: Sequence[int]) -> int:
    """Extrapolate the peak of the next size, twice the last one, from the last two peaks; at least the last peak."""
    return peaks[-1] if len(peaks) == 1 else peaks[-1] + 2 * max(peaks[-1] - peaks[-2], 0)


def _power_of_2(count: float, limit: int) -> int:
    """The largest power of 2 that exceeds neither ``count`` nor ``limit``; at least 1."""
    size = 1
    while size * 2 <= min(count, limit):
        size *= 2
    return size


def split_on_oom(compute: Compute) -> Compute:
    """Wrap ``compute`` to split a batch in halves, again and again, until it fits into the memory of the GPU.

    Later batches of a size that did not fit are split at once. Failed allocations in cuBLAS and cuDNN count as out of
    memory too. The wrapped function raises torch.cuda.OutOfMemoryError if not even one image fits.
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
            # after the except block, in which the exception's traceback keeps the tensors alive
            torch.cuda.empty_cache()
        half = len(batch) // 2
        first, second = compute_halves(batch[:half], images[:half]), compute_halves(batch[half:], images[half:])
        return lambda: first() + second()

    return compute_halves
