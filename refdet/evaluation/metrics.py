"""Overlap of boxes and masks, and metrics computed from it. NumPy and pycocotools only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pycocotools import mask as coco_mask

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

Protocol = Literal["standard", "mattnet", "mdetr"]


def box_iou(a: np.ndarray, b: np.ndarray, protocol: Protocol = "standard") -> np.ndarray:
    """IoU of half-open xyxy boxes: (n, 4) and (m, 4) -> (n, m) float64; 0 if both are empty.

    "mattnet" is computeIoU of lichengunc/MAttNet, lib/models/eval_dets_utils.py, on the inclusive corners x, y,
    x + w - 1, y + h - 1. It equals the standard IoU, except that an intersection of one pixel or less in width or
    height counts as none. "mdetr" is the standard IoU here; it differs only in `box_overlap`.
    """
    intersection, union, _ = _areas(a, b, min_side=1.0 if protocol == "mattnet" else 0.0)
    return _safe_divide(intersection, union)


def generalized_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """GIoU of half-open xyxy boxes: (n, 4) and (m, 4) -> (n, m) float64 in -1..1.

    IoU minus the share of the enclosing box that neither covers (Rezatofighi et al., "Generalized Intersection over
    Union"); 0 if the enclosing box is empty.
    """
    intersection, union, enclosing = _areas(a, b, min_side=0.0)
    return _safe_divide(intersection, union) - _safe_divide(enclosing - union, enclosing)


def box_overlap(a: np.ndarray, b: np.ndarray, protocol: Protocol = "standard") -> np.ndarray:
    """The overlap that must reach 0.5 for a correct answer: (n, 4) and (m, 4) -> (n, m) float64.

    The IoU, or for "mdetr" the generalized IoU (never larger), as in RefExpEvaluator of ashkamath/mdetr,
    datasets/refexp.py.
    """
    return generalized_iou(a, b) if protocol == "mdetr" else box_iou(a, b, protocol)


def _areas(a: np.ndarray, b: np.ndarray, min_side: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Areas of the intersection, the union and the enclosing box of each pair of boxes, (n, m) each.

    An intersection counts only if both sides exceed ``min_side``, in pixels.
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 1, 4), np.asarray(b, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.where((sides > min_side).all(-1), sides.prod(-1), 0.0)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    enclosing = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
    return intersection, union, enclosing


def _safe_divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient; 0 where the denominator is not positive."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def mask_overlap(a: dict, b: dict) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two RLE masks of one size."""
    intersection = int(coco_mask.area(coco_mask.merge([a, b], intersect=True)))
    return intersection, int(coco_mask.area(a)) + int(coco_mask.area(b)) - intersection


def ratio(numerator: float, denominator: float) -> float:
    """Quotient of two numbers; 0 if the denominator is 0."""
    return numerator / denominator if denominator else 0.0


def fraction_at_least(values: Sequence[float] | np.ndarray, threshold: float) -> float:
    """Share of the values that reach the threshold; 0 if there are none."""
    return float(np.mean(np.asarray(values) >= threshold)) if len(values) else 0.0


def mean(values: Sequence[float]) -> float:
    """Mean; 0 if there are no values."""
    return float(np.mean(values)) if len(values) else 0.0


def precisions(ious: Sequence[float]) -> dict[str, float]:
    """Share of the IoUs that reach 0.5, 0.6, ..., 0.9."""
    return {f"precision@{threshold}": fraction_at_least(ious, threshold) for threshold in THRESHOLDS}


def segmentation_scores(overlaps: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Precision at IoU thresholds, overall IoU (sum of intersections over sum of unions) and mean IoU.

    Args:
        overlaps: (intersection, union) in pixels for each sentence.
    """
    ious = [ratio(intersection, union) for intersection, union in overlaps]
    overall = ratio(sum(intersection for intersection, _ in overlaps), sum(union for _, union in overlaps))
    return {**precisions(ious), "overall_iou": overall, "mean_iou": mean(ious)}
