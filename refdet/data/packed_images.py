"""`PackedImages`: the images of a batch in one buffer, to pass from a worker process to the device.

Shape shorthand in this module:

    M: bytes of all images, each padded to a multiple of 4
    Hi, Wi: height and width of image i
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from refdet.device import to_device

Layout = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of an image."""


@dataclass(frozen=True)
class PackedImages:
    """Images of any sizes in one tensor, so that all are shared, pinned and copied to the device in one call.

    Attributes:
        data: (M,) uint8, the bytes of the images one after the other.
        layouts: dtype and shape of each image: uint8 (Hi, Wi, 3), or float32 (3, Hi, Wi).
    """

    data: Tensor
    layouts: list[Layout]

    @classmethod
    def from_images(cls, images: Sequence[np.ndarray]) -> PackedImages:
        """Pack images with the shapes and dtypes of `layouts`."""
        tensors = [torch.from_numpy(np.ascontiguousarray(image)) for image in images]
        buffers = [tensor.flatten().view(torch.uint8) for tensor in tensors]
        # so that each image starts at a multiple of 4, as a view as float32 requires
        padded = [
            torch.cat((buffer, buffer.new_zeros(-len(buffer) % 4))) if len(buffer) % 4 else buffer for buffer in buffers
        ]
        return cls(torch.cat(padded), [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])

    def pin_memory(self) -> PackedImages:
        """Copy to pinned memory."""
        return replace(self, data=self.data.pin_memory())

    def split(self, size: int) -> list[PackedImages]:
        """Split into parts of ``size`` images (the last may have fewer) without copying, as `torch.split` does."""
        offsets = np.cumsum([0, *map(_padded_bytes, self.layouts)])
        return [
            PackedImages(self.data[offsets[first] : offsets[first + size]], self.layouts[first : first + size])
            for first in range(0, len(self.layouts), size)
        ]

    def unpack(self, device: torch.device) -> list[Tensor]:
        """Copy all images to a device at once, asynchronously from pinned memory; return them with their layouts."""
        data, offset, images = to_device(self.data, device), 0, []
        for layout in self.layouts:
            dtype, shape = layout
            images.append(data[offset : offset + _bytes(layout)].view(dtype).view(shape))
            offset += _padded_bytes(layout)
        return images


def _bytes(layout: Layout) -> int:
    """Size of an image, without padding."""
    dtype, shape = layout
    return math.prod(shape) * dtype.itemsize


def _padded_bytes(layout: Layout) -> int:
    """Size of an image, padded to a multiple of 4."""
    return _bytes(layout) + -_bytes(layout) % 4
