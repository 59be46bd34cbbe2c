"""Weights of a convolution times a scale per output channel, in the dtype to compute in, with one kernel each way.

Shape shorthand in this module:

    C, K: input and output channels
    h, w: height and width of a filter
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(weight * scale).to(dtype)``, bit for bit; so is its gradient.

    Args:
        weight: (K, C, h, w).
        scale: (K, 1, 1, 1) in the dtype of the weight; it gets no gradient.
        dtype: of the result.

    Returns:
        (K, C, h, w).
    """
    return weight * scale if dtype == weight.dtype else cast("Tensor", _ScaledWeight.apply(weight, scale, dtype))


class _ScaledWeight(torch.autograd.Function):
    """As two operators, the product and its conversion would each be a kernel forward and another backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None, None  # in the wider dtype of the two
