"""Comparison of detections and features with those that another program recorded."""

from __future__ import annotations

import numpy as np


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of the expected array, in float64."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def match_detections(
    boxes: np.ndarray, labels: np.ndarray, expected_boxes: np.ndarray, expected_labels: np.ndarray
) -> list[tuple[int, int]]:
    """Pairs (expected row, found row) of the same label whose corners are less than 0.05 pixels apart."""
    pairs = []
    for row, (box, label) in enumerate(zip(expected_boxes, expected_labels, strict=True)):
        distance = np.abs(boxes - box).max(axis=1)
        distance[labels != label] = np.inf
        nearest = int(distance.argmin())
        if distance[nearest] < 0.05:
            pairs.append((row, nearest))
    return pairs
