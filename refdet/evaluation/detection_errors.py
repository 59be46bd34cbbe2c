"""Where a detector's regions go wrong: what their scores mean, and which categories they confuse. NumPy only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from refdet.data.coco import Annotation, CocoIndex
from refdet.evaluation.metrics import box_iou
from refdet.structures.regions import Regions

BINS = 10  # of scores in 0..1
MATCH_IOU = 0.5  # IoU from which a region matches an object


@dataclass
class DetectionErrors:
    """Counts over images.

    Attributes:
        images: number of images.
        objects: number of annotated objects, without crowds.
        missed: number of objects that no region of any category matches.
        regions: (`BINS`,) number of regions by score, in bins of equal width over 0..1, the first and last of which
            also count scores outside of 0..1; regions on crowds are counted only if they match an object.
        correct: (`BINS`,) number of these regions that match an object of their category, one region per object.
        score_sums: (`BINS`,) sums of the scores of the counted regions.
        outside: number of the counted regions with a score outside of 0..1, which is no probability.
        confusions: (category of an object, category of the best-scoring region that matches it) -> number of objects;
            objects that no region matches are in ``missed``.
        objects_by_category: category id -> number of objects.
    """

    images: int = 0
    objects: int = 0
    missed: int = 0
    regions: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    correct: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    score_sums: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.float64))
    outside: int = 0
    confusions: Counter[tuple[int, int]] = field(default_factory=Counter)
    objects_by_category: Counter[int] = field(default_factory=Counter)

    def add(self, regions: Regions, annotations: list[Annotation]) -> None:
        """Count the regions of an image against its annotations."""
        objects = [a for a in annotations if not a.iscrowd]
        crowds = [a for a in annotations if a.iscrowd]
        self.images += 1
        self.objects += len(objects)
        self.objects_by_category.update(a.category_id for a in objects)
        order = np.argsort(-regions.scores, kind="stable")
        boxes, categories = regions.boxes[order].astype(np.float64), regions.category_ids[order]
        ious = box_iou(_boxes(objects), boxes)
        self._count_scores(regions.scores[order], categories, ious, objects, _on_crowds(boxes, categories, crowds))
        for object_ious, annotation in zip(ious, objects, strict=True):
            matching = np.flatnonzero(object_ious >= MATCH_IOU)  # of any category, best-scoring first
            if len(matching):
                self.confusions[annotation.category_id, int(categories[matching[0]])] += 1
            else:
                self.missed += 1

    def _count_scores(
        self,
        scores: np.ndarray,
        categories: np.ndarray,
        ious: np.ndarray,
        objects: list[Annotation],
        on_crowd: np.ndarray,
    ) -> None:
        """Match each region, best-scoring first, with the unmatched object of its category that it overlaps most.

        Args:
            scores: (n,) scores of the regions, descending.
            categories: (n,) their category ids.
            ious: (m, n) IoU of each object with each region.
            objects: the m annotated objects.
            on_crowd: (n,) bool, whether each region lies on a crowd of its category.
        """
        labels = np.array([a.category_id for a in objects], np.int64)
        unmatched = np.ones(len(objects), bool)
        # scores of boxes from a file may be outside of 0..1
        bins = np.minimum(np.clip(scores, 0, 1) * BINS, BINS - 1).astype(int)
        for row in range(len(scores)):
            candidates = np.where(unmatched & (labels == categories[row]), ious[:, row], 0.0)
            best = int(candidates.argmax()) if len(candidates) else -1
            is_correct = best >= 0 and candidates[best] >= MATCH_IOU
            if is_correct:
                unmatched[best] = False
            elif on_crowd[row]:
                continue
            self.regions[bins[row]] += 1
            self.score_sums[bins[row]] += float(scores[row])
            self.outside += not 0 <= scores[row] <= 1
            self.correct[bins[row]] += int(is_correct)


def detection_errors(index: CocoIndex, images: Iterable[Regions]) -> DetectionErrors:
    """Count the regions of images against the annotations of an instances file."""
    errors = DetectionErrors()
    for regions in images:
        errors.add(regions, index.annotations[regions.image_id])
    return errors


def _boxes(annotations: list[Annotation]) -> np.ndarray:
    """Boxes (n, 4) float64, half-open xyxy in pixels."""
    return np.array([a.box for a in annotations], np.float64).reshape(-1, 4)


def _on_crowds(boxes: np.ndarray, categories: np.ndarray, crowds: list[Annotation]) -> np.ndarray:
    """Whether at least half of each box (n, 4) xyxy lies in a crowd of its category, as COCO ignores it: (n,) bool."""
    on_crowd = np.zeros(len(boxes), bool)
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-9)  # no division by 0 for an empty box
    for crowd in crowds:
        low, high = np.maximum(boxes[:, :2], crowd.box[:2]), np.minimum(boxes[:, 2:], crowd.box[2:])
        intersection = np.maximum(high - low, 0).prod(axis=1)
        # COCO divides by the area of the box instead of the union
        on_crowd |= (intersection / areas >= MATCH_IOU) & (categories == crowd.category_id)
    return on_crowd
