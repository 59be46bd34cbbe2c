"""Checks for NaN and inf in weights and outputs, which would silently yield no detections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

MAX_WEIGHT = 1e9  # weights of trained networks are below 1e3, running variances of unnormalized inputs below 1e6

MEANS = {"spatial_pool5": "pool5", "spatial_fc7": "fc7"}  # spatial feature -> the feature that is its mean


def find_unusable(tensors: Mapping[str, Tensor], max_weight: float = MAX_WEIGHT) -> list[str]:
    """Names of tensors with NaN, inf or magnitudes above `max_weight`, and of negative running variances."""
    names = []
    for name, value in tensors.items():
        if not value.numel() or not value.dtype.is_floating_point:
            continue
        low, high = (float(end) for end in torch.aminmax(value))  # NaN if any value is NaN
        is_usable = -max_weight <= low and high <= max_weight
        if not is_usable or (name.endswith("running_var") and low < 0):
            names.append(name)
    return names


def all_finite(*tensors: Tensor | None) -> Tensor:
    """Whether all values are finite, as a () bool tensor on the tensors' device; skips None. Does not synchronize."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors if tensor is not None]).all()


def features_to_check(features: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The features without spatial ones whose mean is among them: the mean is finite only if all its values are."""
    return (values for name, values in features.items() if MEANS.get(name) not in features)
