"""`refdet.ops.epilogue.bias_relu` with gradients: bias, shortcut and ReLU in one pass over a convolution's output.

As separate operators they are up to three passes in the forward pass of training. PyTorch's sums in bfloat16 and
float16 are rounded after each of them; here the sum is float32 and rounded once, and the bias keeps its float32
precision under autocast. In float32 the numbers are those of the separate operators.

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

FUSED = frozenset({"cuda"}) & DEVICES  # device types on which training uses the fused pass; CPUs gain nothing from it


def is_fused_faster(device: torch.device) -> bool:
    """Whether `bias_relu` is faster than separate operators on a device; only with gradients enabled."""
    return device.type in FUSED and torch.is_grad_enabled()


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a convolution with weights of `dtype` computes in: of autocast, if it applies."""
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def bias_relu(x: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """``relu(x + bias + shortcut)`` with gradients, of the output of a convolution or pooling that has no other use.

    Layouts and dtypes that the fused pass does not support are computed by separate operators.

    Args:
        x: (N, K, H, W), overwritten; its own gradient function must not need it.
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
    """Keeps nothing but its output, in the memory of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
        y = epilogue.bias_relu(x, bias, shortcut)
        if y is x:
            ctx.mark_dirty(x)
            y = x  # for torch.compile, which does not see that it is
        ctx.save_for_backward(y)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (y,) = ctx.saved_tensors
        masked = torch.ops.aten.threshold_backward(gradient, y, 0)
        of_x, of_bias, of_shortcut = ctx.needs_input_grad
        summed = masked.sum((0, 2, 3), dtype=ctx.bias_dtype) if of_bias else None
        return masked if of_x else None, summed, masked if of_shortcut else None
