"""Chunks in which RoIs are passed through convolutions.

On a GPU, cuDNN selects an algorithm for each new shape of a convolution, which takes about as long as the convolution
itself, and the number of detections differs in nearly every batch. So chunks have only a few distinct sizes, and the
last one is padded. On other devices, chunks only bound the memory.

Shape shorthand in this module:

    K: RoIs of all images in the batch
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Device type -> sizes of chunks, largest first. Padding is less than the smallest.
SIZES = {"cuda": (2048, 512, 128, 32)}


@dataclass(frozen=True)
class Chunk:
    """A chunk of RoIs.

    Attributes:
        first: index of its first RoI.
        count: number of its RoIs.
        size: ``count`` plus the number of padding rows.
    """

    first: int
    count: int
    size: int

    def take(self, values: Tensor) -> Tensor:
        """The chunk's rows (size, ...) of values (K, ...), padded with zeros."""
        rows = values[self.first : self.first + self.count]
        if self.count == self.size:
            return rows
        return torch.cat((rows, rows.new_zeros((self.size - self.count, *rows.shape[1:]))))


def roi_chunks(count: int, device: torch.device, max_size: int | None = None) -> list[Chunk]:
    """Divide RoIs into chunks; a single one if gradients are enabled, as training samples few RoIs.

    Args:
        count: number of RoIs, K.
        device: their device.
        max_size: largest chunk on devices that are not in `SIZES`, None for no limit; ignored with gradients.

    Returns:
        At least one chunk, even if there are no RoIs.
    """
    sizes = None if torch.is_grad_enabled() else SIZES.get(device.type)
    if sizes is None:
        max_size = count if max_size is None or torch.is_grad_enabled() else max_size
        num_chunks = max(-(-count // max(max_size, 1)), 1)
        size = -(-count // num_chunks)
        starts = range(0, count, size) if count else [0]
        return [Chunk(first, min(size, count - first), min(size, count - first)) for first in starts]
    chunks: list[Chunk] = []
    first = 0
    while first < count or not chunks:
        size = next((size for size in sizes if size <= count - first), sizes[-1])
        chunks.append(Chunk(first, min(size, count - first), size))
        first += size
    return chunks
