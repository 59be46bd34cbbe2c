"""Outputs of the detector for a batch: one tensor per output for all images, so that each takes one copy to the host.

Shape shorthand in this module:

    B: images in the batch
    N: boxes of all images
    C, D: channels of pool5 and of fc7
    H, W: height and width of a feature map
    m: height and width of a mask before pasting
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

_Features = TypeVar("_Features", bound="BatchFeatures")
_TensorFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BatchFeatures:
    """Features of the boxes of a batch, ordered by image. Iterating yields the features of each image.

    Attributes:
        counts: number of boxes of each image.
        features: the requested features by name, float32: ``pool5`` (N, C), the mean of the pooled bins; ``fc7``
            (N, D), the input of the box predictor; ``class_prob`` (N, classes + 1), probabilities, background first.
            C4 networks also have ``spatial_pool5`` (N, C, 7, 7), the pooled bins (14x14 in recipes with
            ``model.pooler_resolution: 14``), and, without a VGG, ``spatial_fc7`` (N, D, 7, 7), whose mean is fc7.
        masks: (N, m, m) probabilities within the box, or None if no labels were given.
        feature_map: (B, C, H, W) map that a C4 network pools RoIs from, in the network's dtype; None if not requested.
        finite: () bool, whether all outputs are finite; of detections, also the scores and deltas of all anchors and
            proposals, as NaN scores would silently yield no detections.
    """

    counts: Sequence[int]
    features: dict[str, Tensor]
    masks: Tensor | None
    feature_map: Tensor | None
    finite: Tensor

    def __iter__(self: _Features) -> Iterator[_Features]:
        first = 0
        for image, count in enumerate(self.counts):
            yield self._map_tensors(
                [count], itemgetter(slice(first, first + count)), itemgetter(slice(image, image + 1))
            )
            first += count

    def to_cpu_async(self: _Features, dtype: torch.dtype = torch.float32) -> _Features:
        """Copy to host memory without waiting; synchronize with the GPU before reading the values.

        Args:
            dtype: dtype of the features and the map, converted before the copy. With float32 the map keeps its dtype,
                as a bfloat16 map is smaller to copy.
        """

        def to_host(values: Tensor) -> Tensor:
            return values.to("cpu", non_blocking=True)  # into pinned memory

        features = {name: values.to(dtype) for name, values in self.features.items()}
        feature_map = self.feature_map
        if feature_map is not None and dtype != torch.float32:
            feature_map = feature_map.to(dtype)
        converted = replace(self, features=features, feature_map=feature_map)
        return replace(converted._map_tensors(self.counts, to_host, to_host), finite=to_host(self.finite))

    def _map_tensors(self: _Features, counts: Sequence[int], per_box: _TensorFn, per_image: _TensorFn) -> _Features:
        """A copy with new counts, and a function applied to each tensor with a row per box, or with a row per image."""
        features = {name: per_box(values) for name, values in self.features.items()}
        masks, feature_map = self.masks, self.feature_map
        return replace(
            self,
            counts=counts,
            features=features,
            masks=None if masks is None else per_box(masks),
            feature_map=None if feature_map is None else per_image(feature_map),
        )


@dataclass(frozen=True)
class Detections(BatchFeatures):
    """Detections of a batch, ordered by image, then by descending score; with masks if the detector has a mask branch.

    Attributes:
        boxes: (N, 4) half-open xyxy in pixels of the original image, clipped to it.
        scores: (N,) class probabilities.
        labels: (N,) int64, 1..classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def _map_tensors(self: Detections, counts: Sequence[int], per_box: _TensorFn, per_image: _TensorFn) -> Detections:
        changed = super()._map_tensors(counts, per_box, per_image)
        boxes, scores, labels = (per_box(values) for values in (self.boxes, self.scores, self.labels))
        return replace(changed, boxes=boxes, scores=scores, labels=labels)
