"""Overlap of boxes and masks, and the rates that are made of it. Numpy and pycocotools only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of half-open boxes xyxy: (n, 4) and (m, 4) -> (n, m) float64; 0 where both have no area."""
    a, b = np.asarray(a, np.float64).reshape(-1, 1, 4), np.asarray(b, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def mask_overlap(a: dict, b: dict) -> tuple[int, int]:
    """Pixels in both and in either of two RLE masks of one size."""
    both = int(coco_mask.area(coco_mask.merge([a, b], intersect=True)))
    return both, int(coco_mask.area(a)) + int(coco_mask.area(b)) - both


def rate(values: Sequence[float], threshold: float) -> float:
    """Share of the values that reach the threshold; 0 of none."""
    return float(np.mean(np.asarray(values) >= threshold)) if len(values) else 0.0


def mean(values: Sequence[float]) -> float:
    """Their mean; 0 of none."""
    return float(np.mean(values)) if len(values) else 0.0


def referent_recall(best: Sequence[float], best_of_category: Sequence[float]) -> dict[str, float]:
    """How many referred objects have a region.

    Arguments:
        best: for each ref the highest IoU of its box with a region of its image, 0 without regions.
        best_of_category: the same with regions of its category only.
    """
    recall = {str(threshold): rate(best, threshold) for threshold in THRESHOLDS}
    return {**recall, "mean_best_iou": mean(best), "with_category@0.5": rate(best_of_category, 0.5)}


def segmentation_scores(overlaps: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Precision at IoU thresholds, overall IoU (sum of intersections over sum of unions) and mean IoU.

    Arguments:
        overlaps: (intersection, union) in pixels for each sentence.
    """
    ious = [shared / union if union else 0.0 for shared, union in overlaps]
    whole = sum(union for _, union in overlaps)
    scores = {f"precision@{threshold}": rate(ious, threshold) for threshold in THRESHOLDS}
    return {**scores, "overall_iou": sum(s for s, _ in overlaps) / whole if whole else 0.0, "mean_iou": mean(ious)}
