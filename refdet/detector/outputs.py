"""What the detector finds in a batch of images: one tensor of each kind, so that each leaves the device at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TypeVar

from torch import Tensor

_Kind = TypeVar("_Kind", bound="BatchFeatures")
_Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BatchFeatures:
    """What is in N boxes of a batch of B images, those of the first image first. Iterating gives each image alone.

    Attributes:
        counts: how many of the boxes each image has.
        features: of those that were asked for, float32: ``pool5`` (N, C), mean of the cells pooled from the map;
            ``fc7`` (N, D), what classes and boxes are predicted from; ``class_prob`` (N, classes + 1), probabilities,
            background first; of a C4 network ``spatial_pool5`` (N, C, 7, 7), the cells, and ``spatial_fc7``
            (N, D, 7, 7), whose mean is fc7.
        masks: (N, m, m) probabilities on the box, or None where no classes were given.
        head: (B, C, H, W) the map that C4 features are pooled from, the finest one of a pyramid, in the type that the
            network computes in; None where it was not asked for.
        finite: () bool, whether all that the network said of the boxes is numbers. Of NaN no box is the best, so
            that without this nothing would be found and nothing said.
    """

    counts: Sequence[int]
    features: dict[str, Tensor]
    masks: Tensor | None
    head: Tensor | None
    finite: Tensor

    def __iter__(self: _Kind) -> Iterator[_Kind]:
        first = 0
        for image, count in enumerate(self.counts):
            yield self._changed([count], itemgetter(slice(first, first + count)), itemgetter(slice(image, image + 1)))
            first += count

    def to_cpu_async(self: _Kind) -> _Kind:
        """The same in the host's memory; what a GPU has may still be on its way until it has done all it was given."""

        def to_host(values: Tensor) -> Tensor:
            return values.to("cpu", non_blocking=True)  # into pinned memory

        return replace(self._changed(self.counts, to_host, to_host), finite=to_host(self.finite))

    def _changed(self: _Kind, counts: Sequence[int], of_boxes: _Change, of_images: _Change) -> _Kind:
        features = {name: of_boxes(values) for name, values in self.features.items()}
        masks, head = self.masks, self.head
        return replace(
            self,
            counts=counts,
            features=features,
            masks=None if masks is None else of_boxes(masks),
            head=None if head is None else of_images(head),
        )

    @property
    def pool5(self) -> Tensor:
        """(N, C), where it was asked for."""
        return self.features["pool5"]

    @property
    def fc7(self) -> Tensor:
        """(N, D), where it was asked for."""
        return self.features["fc7"]


@dataclass(frozen=True)
class Detections(BatchFeatures):
    """The detections of a batch of images, of each image best first; masks are there with a mask branch.

    Attributes:
        boxes: (N, 4) half-open xyxy, pixels of the original image, inside it.
        scores: (N,) class probabilities.
        labels: (N,) int64, 1..classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def _changed(self: Detections, counts: Sequence[int], of_boxes: _Change, of_images: _Change) -> Detections:
        changed = super()._changed(counts, of_boxes, of_images)
        boxes, scores, labels = (of_boxes(values) for values in (self.boxes, self.scores, self.labels))
        return replace(changed, boxes=boxes, scores=scores, labels=labels)
