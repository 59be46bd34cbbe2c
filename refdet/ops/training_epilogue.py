"""`refdet.ops.epilogue.bias_relu` with gradients: bias, shortcut and ReLU in one pass over a convolution's output.

As separate operators, bias, shortcut and ReLU read and write the output up to three times. PyTorch's sums in bfloat16
and float16 are rounded after each operator; here the sum is float32 and rounded once, and the bias keeps its float32
precision under autocast. In float32 the results are those of the separate operators.

Shape shorthand in this module:

    N: images or RoIs
    K: output channels of a convolution
    H, W: height and width of its output
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refdet.ops import epilogue
from refdet.ops._library import DEVICES

FUSED = frozenset({"cuda"}) & DEVICES  # device types on which training uses the fused pass; on CPUs it is not faster


def is_fused_training(device: torch.device) -> bool:
    """Whether gradients are enabled, and on this device `bias_relu` is faster than separate operators."""
    return device.type in FUSED and torch.is_grad_enabled()


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a convolution with weights of `dtype` computes in: that of autocast, if it is enabled."""
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def bias_relu(x: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """``relu(x + bias + shortcut)`` with gradients.

    Layouts and dtypes that the fused pass does not support are computed by separate operators.

    Args:
        x: (N, K, H, W), overwritten: the output of a convolution or pooling, whose gradients do not need it, and which
            is not used elsewhere.
        bias: (K,).
        shortcut: (N, K, H, W).

    Returns:
        (N, K, H, W) in the dtype of x.
    """
    if epilogue.supports(x, shortcut):
        return cast("Tensor", _BiasRelu.apply(x, bias.float(), shortcut))
    y = x.add_(bias.to(x.dtype)[:, None, None])
    return y.relu_() if shortcut is None else y.add_(shortcut).relu_()


class _BiasRelu(torch.autograd.Function):
    """`bias_relu` in place; saves only its output for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
        y = epilogue.bias_relu(x, bias, shortcut)
        if y is x:
            ctx.mark_dirty(x)
            y = x  # torch.compile does not know that they are the same tensor
        ctx.save_for_backward(y)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (y,) = ctx.saved_tensors
        masked = torch.ops.aten.threshold_backward(gradient, y, 0)
        needs_x, needs_bias, needs_shortcut = ctx.needs_input_grad
        grad_bias = masked.sum((0, 2, 3), dtype=ctx.bias_dtype) if needs_bias else None
        return masked if needs_x else None, grad_bias, masked if needs_shortcut else None
