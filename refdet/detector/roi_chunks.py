"""Chunks of RoIs that pass through convolutions together.

On a GPU, kernels take longer to launch than to run, so a chunk should have as many RoIs as memory allows: nearly always
all of them. But cuDNN selects an algorithm for each new shape of a convolution, PyTorch's allocator reuses blocks of
the same size, and the number of detections differs in nearly every batch. So the size of a chunk is rounded up to one
of 8 sizes between a power of 2 and the next. On other devices, chunks only bound the memory.

Shape shorthand in this module:

    K: RoIs of all images in the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDED_DEVICES = frozenset(("cuda",))  # device types on which chunks are padded
MIN_SIZE = 32  # of a padded chunk
SIZES_PER_DOUBLING = 8  # so less than an eighth of a chunk is padding, unless its size is MIN_SIZE
GPU_CHUNK_BYTES = 5 * 2**28  # limit of one activation; 5120 RoIs of ResNet-101-C4 in bfloat16, 2560 in float32


@dataclass(frozen=True)
class Chunk:
    """A chunk of RoIs; only the last one of a batch is padded.

    Attributes:
        first: index of the chunk's first RoI in the batch.
        count: number of RoIs.
        size: number of rows: ``count``, plus those of padding.
    """

    first: int
    count: int
    size: int

    def take(self, values: Tensor) -> Tensor:
        """The chunk's rows (size, ...) of values (K, ...), padded with zeros unless `pad_rows` has done so."""
        return pad_rows(values[self.first : self.first + self.size], self.size)


def pad_rows(values: Tensor, size: int) -> Tensor:
    """Pad values (K, ...) with zeros to (size, ...)."""
    missing = size - len(values)
    return torch.cat((values, values.new_zeros((missing, *values.shape[1:])))) if missing else values


def cat_chunks(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the results of chunks, without a copy if there is one chunk."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def roi_chunks(count: int, device: torch.device, roi_bytes: int, max_size: int | None = None) -> list[Chunk]:
    """Divide RoIs into chunks; a single one if gradients are enabled, as training samples few RoIs.

    On a GPU there are as few chunks as `GPU_CHUNK_BYTES` allows, of one size, except that the last one may be smaller.

    Args:
        count: number of RoIs, K.
        device: the device of the RoIs.
        roi_bytes: bytes of the largest activation of one RoI.
        max_size: largest chunk on devices that are not in `PADDED_DEVICES`, None for no limit; ignored with gradients.

    Returns:
        At least one chunk, even if there are no RoIs.
    """
    padded = device.type in PADDED_DEVICES and not torch.is_grad_enabled()
    if padded:
        max_size = _largest_size(GPU_CHUNK_BYTES // roi_bytes)
    elif max_size is None or torch.is_grad_enabled():
        max_size = count
    num_chunks = max(-(-count // max(max_size, 1)), 1)
    size = -(-count // num_chunks)
    if padded:
        size = padded_size(size)
    chunks: list[Chunk] = []
    for first in range(0, count, size) if count else [0]:
        rows = min(size, count - first)
        chunks.append(Chunk(first, rows, padded_size(rows) if padded else rows))
    return chunks


def padded_size(count: int) -> int:
    """The smallest size of a padded chunk with room for `count` RoIs."""
    step = _step(count - 1)
    return max(-(-count // step) * step, MIN_SIZE)


def _largest_size(limit: int) -> int:
    """The largest size of a padded chunk up to `limit`, or the smallest size if that is larger."""
    step = _step(limit)
    return max(limit // step * step, MIN_SIZE)


def _step(count: int) -> int:
    """Distance between sizes in the doubling with `count`, from a power of 2 up to the next."""
    return max(2 ** (max(count, 1).bit_length() - 1), MIN_SIZE) // SIZES_PER_DOUBLING
