"""3x3 convolutions with gradients on the CPU, by Winograd's minimal filtering: `F.conv2d` in about half the time.

Shape shorthand in this module:

    N: images
    C, K: input and output channels
    H, W: height and width of a feature map
    H', W': height and width of the output
    kh, kw: height and width of a filter
    P: evaluation points of a tile of 4x4 outputs, 36

The output and the gradient of the input are convolutions by the kernel of `refdet.ops.convolution`; the weights are
transformed in each call, which takes as long as convolving about 30 tiles. The gradient of the weights has another
kernel, the transpose of the same algorithm, with rounding errors up to five times those of PyTorch's convolution.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refdet.ops.convolution import (
    CHANNEL_MULTIPLE,
    OUTPUT_MULTIPLE,
    POINTS,
    Packed,
    conv3x3,
    conv3x3_weight_gradient,
    has_kernels,
    pack_conv3x3,
)

TILE, TAPS = 4, 3  # sides of a tile of outputs and of a filter
MIN_CHANNELS, MIN_TILES = 64, 48  # with fewer, PyTorch's convolution is faster
VECTOR = 16  # float32 numbers in a vector of AVX-512


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` within rounding; faster for 3x3 float32 convolutions with gradients on the CPU.

    Args:
        x: (N, C, H, W), fastest in channels_last.
        weight: (K, C / groups, kh, kw).
        bias: (K,) or None.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: zeros on each side, or a string as in `F.conv2d`.
        dilation: spacing of the filter's taps.
        groups: number of groups of channels.

    Returns:
        (N, K, H', W').
    """
    is_plain = stride == padding == dilation == (1, 1) and groups == 1 and weight.shape[2:] == (TAPS, TAPS)
    if is_plain and torch.is_grad_enabled() and _is_faster(x, weight):
        return cast("Tensor", _Convolution.apply(x, weight, bias))
    if torch.is_grad_enabled() and _crashes_onednn(x, weight, stride, padding, groups):
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)  # a 1x1 filter reads only these positions
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernels support a plain 3x3 convolution of these tensors, and are faster than PyTorch."""
    outputs, inputs = weight.shape[:2]
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(inputs, outputs) >= MIN_CHANNELS
        and inputs % OUTPUT_MULTIPLE[False] == outputs % OUTPUT_MULTIPLE[False] == 0
        and x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE) >= MIN_TILES
        and has_kernels(x.device)
    )


def _crashes_onednn(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...] | str, groups: int
) -> bool:
    """Whether oneDNN would crash when it computes the gradient of the weights, as in PyTorch 2.14.1 with AVX-512.

    oneDNN's kernel for strided 1x1 convolutions reads a full vector of input channels, even if there are fewer.
    """
    pointwise = weight.shape[2:] == (1, 1) and padding in ((0, 0), "valid") and groups == 1
    return pointwise and max(stride) > 1 and weight.shape[1] < VECTOR and x.device.type == "cpu"


class _Convolution(torch.autograd.Function):
    """A 3x3 convolution with stride 1 and padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        packed = _pack_weights(weight)
        return conv3x3(x, packed, torch.zeros_like(packed.scale) if bias is None else bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            packed = _pack_weights(weight.flip(2, 3).transpose(0, 1))
            grad_x = conv3x3(gradient, packed, torch.zeros_like(packed.scale))
        if ctx.needs_input_grad[1]:
            grad_weight = conv3x3_weight_gradient(x, gradient)
        if ctx.needs_input_grad[2]:
            grad_bias = gradient.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def _pack_weights(weight: Tensor) -> Packed:
    """`pack_conv3x3` of weights (K, C, 3, 3), as one matrix product."""
    outputs, inputs = weight.shape[:2]
    panel = OUTPUT_MULTIPLE[False]
    taps = weight.permute(2, 3, 0, 1).reshape(TAPS * TAPS, outputs // panel, panel, inputs).transpose(2, 3)
    at_points = _weight_transform() @ taps.reshape(TAPS * TAPS, -1)
    return Packed(at_points.view(POINTS, outputs // panel, inputs, panel), weight.new_ones(outputs))


@functools.cache
def _weight_transform() -> Tensor:
    """Matrix (P, 9) that transforms a flattened 3x3 filter to its values at the points."""
    unit = torch.zeros(OUTPUT_MULTIPLE[False], CHANNEL_MULTIPLE, TAPS * TAPS)
    unit[0, : TAPS * TAPS] = torch.eye(TAPS * TAPS)
    return pack_conv3x3(unit.unflatten(2, (TAPS, TAPS))).weight[:, 0, : TAPS * TAPS, 0].clone()
