"""Checks that weights and outputs are numbers: of NaN no box is the best, so that nothing is found and nothing said."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# What multiplies beyond any use. Weights are below a thousand, variances of unnormalised inputs below a million.
LARGEST_WEIGHT = 1e9


def unusable(tensors: Mapping[str, Tensor], largest: float = LARGEST_WEIGHT) -> list[str]:
    """Names of tensors with NaN, inf or values beyond `largest`, and of variances below 0, whose root is NaN.

    One pass over the numbers, without copies of them.
    """
    bad = []
    for name, value in tensors.items():
        if not value.numel() or not value.dtype.is_floating_point:
            continue
        low, high = (float(end) for end in torch.aminmax(value))
        usable = math.isfinite(low) and math.isfinite(high) and -largest <= low and high <= largest
        if not usable or (name.endswith("running_var") and low < 0):
            bad.append(name)
    return bad


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all numbers of some tensors of one device are finite, as a scalar there, for which nothing waits."""
    return torch.stack([value.isfinite().all() for value in tensors]).all()
