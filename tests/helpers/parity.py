"""Comparison of detections and features with those that another program computed."""

from __future__ import annotations

import numpy as np


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of the expected array, in float64."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def match_detections(
    boxes: np.ndarray, labels: np.ndarray, expected_boxes: np.ndarray, expected_labels: np.ndarray
) -> list[tuple[int, int]]:
    """Match each expected detection with the nearest box of its label, if there is one within 0.05 pixels.

    Args:
        boxes: (N, 4) found boxes, N > 0.
        labels: (N,) their labels.
        expected_boxes: (M, 4) boxes.
        expected_labels: (M,) their labels.

    Returns:
        Pairs (expected row, found row) whose coordinates all differ by less than 0.05.
    """
    pairs = []
    for row, (box, label) in enumerate(zip(expected_boxes, expected_labels, strict=True)):
        distances = np.abs(boxes - box).max(axis=1)
        distances[labels != label] = np.inf
        nearest = int(distances.argmin())
        if distances[nearest] < 0.05:
            pairs.append((row, nearest))
    return pairs
