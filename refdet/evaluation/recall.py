"""Referent recall: the share of referred objects that have a region. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refdet.evaluation.metrics import THRESHOLDS, Protocol, box_iou, fraction_at_least, mean
from refdet.structures.regions import Regions

TOP_K = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Coverage:
    """Best IoU of one referred object with the regions of its image.

    Attributes:
        best: highest IoU of its box with the k top-scoring regions, for each k in `TOP_K` and then for all; 0 without
            regions.
        best_of_category: the same for regions of its category.
    """

    best: tuple[float, ...]
    best_of_category: tuple[float, ...]


def coverage(
    boxes: np.ndarray, category_ids: Sequence[int], regions: Regions, protocol: Protocol = "standard"
) -> list[Coverage]:
    """The coverage of the n referred objects of one image.

    Args:
        boxes: (n, 4) half-open xyxy in pixels of the image.
        category_ids: n category ids.
        regions: the regions of the image.
        protocol: how boxes are compared.
    """
    ious = box_iou(boxes, regions.boxes, protocol)
    same_category = np.asarray(category_ids).reshape(-1, 1) == regions.category_ids.reshape(1, -1)
    order = np.argsort(-regions.scores, kind="stable")  # ties in the order of the store
    best, of_category = _best_at_k(ious[:, order]), _best_at_k(np.where(same_category, ious, 0.0)[:, order])
    return [Coverage(tuple(a), tuple(b)) for a, b in zip(best.tolist(), of_category.tolist(), strict=True)]


def _best_at_k(ious: np.ndarray) -> np.ndarray:
    """Maximum of the first k values of each row (n, m), for each k in `TOP_K` and then for all: (n, 8)."""
    # a column of zeros comes first, so that column k is the maximum of the first k, and 0 without regions
    running_max = np.maximum.accumulate(np.pad(ious, ((0, 0), (1, 0))), axis=1)
    last = running_max.shape[1] - 1
    return running_max[:, [min(k, last) for k in (*TOP_K, last)]]


def referent_recall(coverages: Sequence[Coverage]) -> dict[str, float]:
    """Share of referred objects with a region of at least IoU 0.5, 0.6, ..., 0.9.

    Args:
        coverages: the coverage of each object.

    Returns:
        "0.5" to "0.9" for regions of any category, "with_category@0.5" to "with_category@0.9" for regions of the
        object's category, and "mean_best_iou", the mean over objects of the highest IoU with a region of any category.
    """
    best, of_category = [c.best[-1] for c in coverages], [c.best_of_category[-1] for c in coverages]
    recall = {str(threshold): fraction_at_least(best, threshold) for threshold in THRESHOLDS}
    recall["mean_best_iou"] = mean(best)
    return recall | {
        f"with_category@{threshold}": fraction_at_least(of_category, threshold) for threshold in THRESHOLDS
    }


def recall_at_k(coverages: Sequence[Coverage], with_category: bool = False) -> dict[str, float]:
    """Recall at IoU 0.5 with the 1, 2, ..., 100 top-scoring regions of an image, and with all.

    It is the upper bound of any model that picks one of these regions.
    """
    best = [c.best_of_category if with_category else c.best for c in coverages]
    names = [*map(str, TOP_K), "all"]
    return {
        name: fraction_at_least([object_ious[index] for object_ious in best], 0.5) for index, name in enumerate(names)
    }
