"""Convert numbers of a store for JSON, which has neither NaN nor infinity; only a damaged store has any."""

from __future__ import annotations

from typing import Any

import numpy as np

_INFINITY = 1e9  # stands for infinity; beyond any coordinate or score


def to_json_numbers(values: np.ndarray, digits: int = 4) -> list[Any]:
    """Nested lists of the numbers of an array, rounded; NaN becomes 0, and infinity `_INFINITY`."""
    numbers: list[Any] = _replace_non_finite(values.astype(np.float64)).round(digits).tolist()
    return numbers


def shortest_decimals(scores: np.ndarray) -> list[float]:
    """The shortest decimals that round to the float32 scores: 0.7 instead of 0.699999988."""
    return [float(str(score)) for score in _replace_non_finite(scores.astype(np.float32))]


def _replace_non_finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values, posinf=_INFINITY, neginf=-_INFINITY)
