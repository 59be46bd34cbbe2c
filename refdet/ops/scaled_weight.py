"""Scale the weights of a convolution per output channel and convert their dtype, in one GPU kernel.

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
    """``(weight * scale).to(dtype)``; result and gradient have the same bits as of these two operators.

    Args:
        weight: (K, C, h, w).
        scale: (K, 1, 1, 1) in the dtype of the weight; it gets no gradient.
        dtype: of the result.

    Returns:
        (K, C, h, w).
    """
    # torch.compile fuses the two operators, and in PyTorch 2.11 does not support `out` in channels_last
    if dtype == weight.dtype or torch.compiler.is_compiling():
        return (weight * scale).to(dtype)
    return cast("Tensor", _ScaledWeight.apply(weight, scale, dtype))


class _ScaledWeight(torch.autograd.Function):
    """The product and the conversion in one kernel, and one in the backward pass, instead of two each."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None, None  # promoted to the wider dtype of the two
