"""Overlap of boxes and masks, and the rates that are made of it. Numpy and pycocotools only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pycocotools import mask as coco_mask

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

Protocol = Literal["standard", "mattnet", "mdetr"]


def box_iou(a: np.ndarray, b: np.ndarray, protocol: Protocol = "standard") -> np.ndarray:
    """IoU of half-open boxes xyxy: (n, 4) and (m, 4) -> (n, m) float64; 0 where both have no area.

    "mattnet" is computeIoU of lichengunc/MAttNet, lib/models/eval_dets_utils.py. It takes boxes x y w h to the
    inclusive corners x, y, x + w - 1, y + h - 1 and counts pixels with + 1, which gives the same number, but for this:
    it asks for one inclusive corner to lie left of the other, so an overlap of one pixel or less in width or height
    is none. It differs for thin boxes and for slight overlaps only. "mdetr" has the standard IoU: see `box_overlap`.
    """
    shared, union, _ = _areas(a, b, least=1.0 if protocol == "mattnet" else 0.0)
    return _quotient(shared, union)


def generalized_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """GIoU of half-open boxes xyxy: (n, 4) and (m, 4) -> (n, m) float64 in -1..1.

    IoU less the share of the smallest box around both that neither covers: Rezatofighi et al., "Generalized
    Intersection over Union". 0 where that box has no area.
    """
    shared, union, around = _areas(a, b, least=0.0)
    return _quotient(shared, union) - _quotient(around - union, around)


def box_overlap(a: np.ndarray, b: np.ndarray, protocol: Protocol = "standard") -> np.ndarray:
    """What must reach 0.5 for an answer to be right: (n, 4) and (m, 4) -> (n, m) float64.

    The IoU, but for "mdetr" the generalized IoU, as in RefExpEvaluator of ashkamath/mdetr, datasets/refexp.py. It is
    never more than the IoU.
    """
    return generalized_iou(a, b) if protocol == "mdetr" else box_iou(a, b, protocol)


def _areas(a: np.ndarray, b: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Areas of the intersection, the union and the enclosing box of each pair of n and m boxes, (n, m) each.

    An intersection counts if its sides are more than `least`.
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 1, 4), np.asarray(b, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.where((sides > least).all(-1), sides.prod(-1), 0.0)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    around = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
    return shared, union, around


def _quotient(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def mask_overlap(a: dict, b: dict) -> tuple[int, int]:
    """Pixels in both and in either of two RLE masks of one size."""
    both = int(coco_mask.area(coco_mask.merge([a, b], intersect=True)))
    return both, int(coco_mask.area(a)) + int(coco_mask.area(b)) - both


def ratio(part: float, whole: float) -> float:
    """Part / whole, and 0 of nothing."""
    return part / whole if whole else 0.0


def rate(values: Sequence[float] | np.ndarray, threshold: float) -> float:
    """Share of the values that reach the threshold; 0 of none."""
    return float(np.mean(np.asarray(values) >= threshold)) if len(values) else 0.0


def mean(values: Sequence[float]) -> float:
    """Their mean; 0 of none."""
    return float(np.mean(values)) if len(values) else 0.0


def precisions(ious: Sequence[float]) -> dict[str, float]:
    """Share of the IoUs that reach 0.5, 0.6, ..., 0.9."""
    return {f"precision@{threshold}": rate(ious, threshold) for threshold in THRESHOLDS}


def segmentation_scores(overlaps: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Precision at IoU thresholds, overall IoU (sum of intersections over sum of unions) and mean IoU.

    Args:
        overlaps: (intersection, union) in pixels for each sentence.
    """
    ious = [ratio(shared, union) for shared, union in overlaps]
    overall = ratio(sum(shared for shared, _ in overlaps), sum(union for _, union in overlaps))
    return {**precisions(ious), "overall_iou": overall, "mean_iou": mean(ious)}
