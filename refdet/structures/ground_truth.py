"""The annotated objects of training images: `GroundTruth` of an image, `PaddedGroundTruth` of a batch.

Shape shorthand in this module:

    B: images in the batch
    G: objects of an image; in a batch, the maximum over its images
    K: crowds, likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refdet.device import to_device


@dataclass(frozen=True)
class GroundTruth:
    """The objects of one training image.

    Attributes:
        boxes: (G, 4) float32, half-open xyxy in pixels of the network's input.
        labels: (G,) int64, 1..number of classes; 0 is the background.
        masks: G pycocotools RLEs in pixels of the original image, None for an object without a mask; None if masks are
            not trained.
        crowds: (K, 4) boxes of crowds in pixels of the network's input, ignored in training.
        scale: (sx, sy), size of the resized image (before any crop) divided by the size of the original image.
        flipped_width: width of the original image in pixels if the image was flipped, else None.
        crop_origin: x and y in the resized image of the crop's top left corner; (0, 0) if the input is not a crop.
    """

    boxes: Tensor
    labels: Tensor
    masks: list[dict | None] | None
    crowds: Tensor
    scale: tuple[float, float]
    flipped_width: int | None = None
    crop_origin: tuple[int, int] = (0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the tensors as arrays, by value.

        PyTorch would send each tensor to another process as a file of shared memory, which both processes keep open.
        The images that are read ahead have more tensors than the usual limit of 1024 open files.
        """
        arrays = (self.boxes.numpy(), self.labels.numpy(), self.crowds.numpy())
        return _from_arrays, (*arrays, self.masks, self.scale, self.flipped_width, self.crop_origin)


def _from_arrays(boxes: np.ndarray, labels: np.ndarray, crowds: np.ndarray, masks: Any, *rest: Any) -> GroundTruth:
    """The inverse of `GroundTruth.__reduce__`."""
    return GroundTruth(torch.from_numpy(boxes), torch.from_numpy(labels), masks, torch.from_numpy(crowds), *rest)


@dataclass(frozen=True)
class PaddedGroundTruth:
    """The objects of a batch, padded to the same number per image with empty boxes, which overlap nothing.

    Attributes:
        boxes: (B, G, 4) float32, half-open xyxy in pixels of the network's input; G is at least 1.
        labels: (B, G) int64, 1..number of classes; 0 where padded.
        valid: (B, G) bool, False where padded.
        crowds: (B, K, 4) boxes of crowds, padded with empty boxes; K may be 0.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    crowds: Tensor

    @classmethod
    def pad(cls, targets: Sequence[GroundTruth], device: torch.device) -> PaddedGroundTruth:
        """Pad the objects of each image and copy them to a device, in four transfers for any number of images."""
        max_objects = max([1, *(len(target.boxes) for target in targets)])
        max_crowds = max([0, *(len(target.crowds) for target in targets)])
        like = targets[0].boxes
        boxes, crowds = (like.new_zeros(len(targets), length, 4) for length in (max_objects, max_crowds))
        labels = like.new_zeros(len(targets), max_objects, dtype=torch.int64)
        num_objects = torch.tensor([len(target.boxes) for target in targets])
        valid = torch.arange(max_objects) < num_objects[:, None]
        for row, target in enumerate(targets):
            boxes[row, : len(target.boxes)], labels[row, : len(target.boxes)] = target.boxes, target.labels
            crowds[row, : len(target.crowds)] = target.crowds
        return cls(*(to_device(values, device) for values in (boxes, labels, valid, crowds)))
