"""1x1 and 3x3 convolutions on the CPU, by compiled kernels.

Shape shorthand in this module:

    N: images
    C, K: input and output channels
    H, W: height and width of a feature map
    P: matrices of packed weights, 36 for a 3x3 convolution and 1 for a 1x1

A panel is a group of output channels that a kernel computes together.

3x3 convolutions, with stride 1 and padding 1, use Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2016), which needs a quarter to a third of the multiplications. 1x1 convolutions are
matrix products, fused with the shortcut and ReLU after them. The result of an image has the same bits in any batch.
Gradients are in `refdet.ops.training_convolution`. In a 3x3 convolution, inputs beyond 5e36 overflow, and a NaN or inf
spreads to the whole 4x4 tile of outputs.

Single precision: float32 inputs and sums. The error of a 3x3 convolution is about twice that of PyTorch's, 2e-6 of the
standard deviation with 512 channels. Half precision (`half`): bfloat16 inputs and float16 products, on processors with
AVX512-FP16, which has twice the throughput of float32 or bfloat16. Rows and columns are scaled by powers of two to
prevent overflow; 64 products are summed in float16, and those sums in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refdet.ops._library import DEVICES

CHANNEL_MULTIPLE = 16  # number of input channels must be a multiple of this
OUTPUT_MULTIPLE = {False: 16, True: 64}  # `half` -> number of output channels must be a multiple of this
POINTS = 36  # evaluation points of the 3x3 Winograd transform


class Packed(NamedTuple):
    """Weights in the layout of the kernels.

    Attributes:
        weight: (P, K / panel, C, panel): float32 in panels of 16 output channels, or float16 in panels of 64 (`half`).
        scale: (K,) float32; the sums are multiplied by it to undo the scaling of float16 weights.
    """

    weight: Tensor
    scale: Tensor


def has_kernels(device: torch.device, half: bool = False) -> bool:
    """Whether there are kernels for a device: CPUs with AVX2, or with AVX512-FP16 for `half`."""
    return device.type == "cpu" and "cpu" in DEVICES and torch.ops.refdet.has_products(half)


def is_pointwise_faster(device: torch.device, half: bool) -> bool:
    """Whether `conv1x1` is faster than PyTorch: with `half`, or in float32 with the 32 registers of AVX-512."""
    return has_kernels(device, half) and (half or torch.ops.refdet.has_avx512())


def is_half_fastest(device: torch.device) -> bool:
    """Whether bfloat16 layers should use `half`: there are kernels, and no AMX, with which PyTorch is faster."""
    return has_kernels(device, half=True) and not torch.ops.refdet.has_matrix_units()


def pack_conv3x3(weight: Tensor, half: bool = False) -> Packed:
    """Pack float32 weights (K, C, 3, 3) for `conv3x3`; packed float32 weights are four times as large.

    Raises:
        RuntimeError: C or K is not a multiple of `CHANNEL_MULTIPLE` or `OUTPUT_MULTIPLE`, the weights are not float32,
            or there is no kernel.
    """
    return Packed(*torch.ops.refdet.pack_conv3x3(weight.detach(), half))


def conv3x3(x: Tensor, packed: Packed, bias: Tensor, relu: bool = False) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` within rounding.

    Args:
        x: (N, C, H, W) float32, or bfloat16 for half; fastest in channels_last.
        packed: from `pack_conv3x3`.
        bias: (K,) float32.
        relu: apply ReLU.

    Returns:
        (N, K, H, W) in the dtype of x, channels_last.

    Raises:
        RuntimeError: shapes or dtypes do not match.
    """
    return torch.ops.refdet.conv3x3(x, packed.weight, packed.scale, bias, relu)


def conv3x3_weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient (K, C, 3, 3) of the weights of a 3x3 convolution with stride 1 and padding 1, within rounding.

    Args:
        x: input of the convolution, (N, C, H, W) float32; fastest in channels_last.
        gradient: gradient of its output, (N, K, H, W) float32; fastest in channels_last.

    Raises:
        RuntimeError: shapes or dtypes do not match, or C or K is not a multiple of `CHANNEL_MULTIPLE`.
    """
    return torch.ops.refdet.conv3x3_weight_gradient(x, gradient)


def pack_conv1x1(weight: Tensor, half: bool = False) -> Packed:
    """Pack float32 weights (K, C) for `conv1x1`.

    Raises:
        RuntimeError: C or K is not a multiple of `CHANNEL_MULTIPLE` or `OUTPUT_MULTIPLE`, the weights are not float32,
            or there is no kernel.
    """
    return Packed(*torch.ops.refdet.pack_conv1x1(weight.detach(), half))


def conv1x1(x: Tensor, packed: Packed, bias: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
    """``F.conv2d(x, weight[:, :, None, None], bias) + shortcut`` within rounding.

    Args:
        x: (N, C, H, W) float32, or bfloat16 for half; fastest in channels_last.
        packed: from `pack_conv1x1`.
        bias: (K,) float32.
        shortcut: (N, K, H, W) in the dtype of x; fastest in channels_last.
        relu: apply ReLU.

    Returns:
        (N, K, H, W) in the dtype of x, channels_last.

    Raises:
        RuntimeError: shapes or dtypes do not match.
    """
    return torch.ops.refdet.conv1x1(x, packed.weight, packed.scale, bias, shortcut, relu)


if DEVICES:

    def _packed_fake(weight: Tensor, matrices: int, half: bool) -> tuple[Tensor, Tensor]:
        channels, inputs = weight.shape[:2]
        dtype = torch.float16 if half else torch.float32
        shape = (matrices, channels // OUTPUT_MULTIPLE[half], inputs, OUTPUT_MULTIPLE[half])
        return weight.new_empty(shape, dtype=dtype), weight.new_empty((channels,))

    def _convolved_fake(x: Tensor, weight: Tensor) -> Tensor:
        images, _, height, width = x.shape
        shape = (images, weight.shape[1] * weight.shape[3], height, width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    @torch.library.register_fake("refdet::pack_conv3x3")
    def _pack_conv3x3_fake(weight: Tensor, half: bool = False) -> tuple[Tensor, Tensor]:
        return _packed_fake(weight, POINTS, half)

    @torch.library.register_fake("refdet::pack_conv1x1")
    def _pack_conv1x1_fake(weight: Tensor, half: bool = False) -> tuple[Tensor, Tensor]:
        return _packed_fake(weight, 1, half)

    @torch.library.register_fake("refdet::conv3x3")
    def _conv3x3_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
        return _convolved_fake(x, weight)

    @torch.library.register_fake("refdet::conv3x3_weight_gradient")
    def _weight_gradient_fake(x: Tensor, gradient: Tensor) -> Tensor:
        return x.new_empty((3, 3, gradient.shape[1], x.shape[1])).permute(2, 3, 0, 1)

    @torch.library.register_fake("refdet::conv1x1")
    def _conv1x1_fake(
        x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        return _convolved_fake(x, weight)
