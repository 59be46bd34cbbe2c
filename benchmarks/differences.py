"""Relative differences between two computations of the same values."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor


def largest(values: Iterable[float]) -> float:
    """The largest value, NaN if any is NaN: unlike `max`, which may skip it. 0 without values."""
    return float(np.max([*values], initial=0.0))


def row_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest L2 distance between corresponding rows, relative to the expected row's norm or the typical norm.

    The larger of both norms counts; the typical norm is the root mean square of the norms of all expected rows. Without
    it, a row that a ReLU leaves at or near zero would fail: rounding errors of earlier layers change it as much as any
    other row, possibly by many times its norm. A wrong row still shows, as it differs by about its norm.

    Args:
        actual: rows (N, ...), such as the features of boxes, or the channels of a map.
        expected: the same rows from the computation to compare with.

    Returns:
        0 without rows; NaN if a value is NaN.
    """
    if not len(expected):
        return 0.0
    target = expected.double().flatten(1)
    norms = target.norm(dim=1)
    scale = norms.clamp(min=float(norms.square().mean().sqrt()))
    return float(((actual.double().flatten(1) - target).norm(dim=1) / scale.clamp(min=1e-30)).max())
