"""Checks for NaN and inf in weights and outputs, which would silently yield no detections."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Real weights are below 1e3, variances of unnormalized inputs below 1e6.
MAX_WEIGHT = 1e9


def find_unusable(tensors: Mapping[str, Tensor], max_weight: float = MAX_WEIGHT) -> list[str]:
    """Names of tensors with NaN, inf or magnitudes above `max_weight`, and of negative running variances."""
    names = []
    for name, value in tensors.items():
        if not value.numel() or not value.dtype.is_floating_point:
            continue
        low, high = (float(end) for end in torch.aminmax(value))
        usable = math.isfinite(low) and math.isfinite(high) and -max_weight <= low and high <= max_weight
        if not usable or (name.endswith("running_var") and low < 0):
            names.append(name)
    return names


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all values are finite, as a () bool tensor on the tensors' device; does not synchronize."""
    return torch.stack([value.isfinite().all() for value in tensors]).all()
