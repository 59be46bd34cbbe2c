"""Convolutions of a network in use: compiled kernels for 1x1 and 3x3 ones on the CPU.

3x3 convolutions go by Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016), which needs a third of the multiplications. Stride 1, one row of zeros around the map. 1x1 ones are
products of matrices with the sum and the ReLU that follow them. Of each image the result is the same bits, whatever
else is in its batch. There are no gradients. A map beyond 5e36 overflows in a 3x3 convolution, and a number that is not
finite spoils all results of its tile, some 4x4.

There are two kinds of arithmetic. *Single*: maps float32, sums float32; what comes out of a 3x3 convolution is about
twice as far from the exact result as that of PyTorch's, some 2e-6 of its standard deviation with 512 channels. *Half*:
maps bfloat16, products of float16 numbers, on processors with AVX512-FP16, which do twice as many of them in a second
as in float32 or bfloat16. Rows and columns are scaled by powers of two, so that nothing overflows; 64 products are
summed in float16, and those sums in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refdet.ops._library import DEVICES

CHANNELS = 16  # input channels are multiples of it
OUTPUTS = {False: 16, True: 64}  # so are output channels; the key is `half`
POINTS = 36  # at which a 3x3 convolution multiplies


class Packed(NamedTuple):
    """Weights as the kernels take them.

    Attributes:
        weight: (P, K / panel, C, panel), float32 and panels of 16 output channels, or with `half` float16 and 64; P is
            36 of a 3x3 convolution and 1 of a 1x1.
        scale: (K,) float32, what sums are multiplied by.
    """

    weight: Tensor
    scale: Tensor


def has_products(device: torch.device, half: bool = False) -> bool:
    """Whether there are kernels for tensors of a device: on processors with AVX2, or `half` with AVX512-FP16."""
    return device.type == "cpu" and "cpu" in DEVICES and torch.ops.refdet.has_products(half)


def pointwise_is_quicker(device: torch.device, half: bool) -> bool:
    """Whether `conv1x1` is quicker than PyTorch's: with `half`, or in float32 with the 32 registers of AVX-512."""
    return has_products(device, half) and (half or torch.ops.refdet.has_avx512())


def half_is_quickest(device: torch.device) -> bool:
    """Whether bfloat16 layers should go by *half*: there are kernels, and no matrix units (AMX), which PyTorch uses."""
    return has_products(device, half=True) and not torch.ops.refdet.has_matrix_units()


def pack_conv3x3(weight: Tensor, half: bool = False) -> Packed:
    """Weights (K, C, 3, 3), float32, as `conv3x3` takes them; four times as many numbers.

    Raises:
        RuntimeError: channels are not multiples of `CHANNELS` and `OUTPUTS`, the weights are not float32, or there is
            no kernel.
    """
    return Packed(*torch.ops.refdet.pack_conv3x3(weight.detach(), half))


def conv3x3(x: Tensor, packed: Packed, bias: Tensor, relu: bool = False) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` within rounding.

    Args:
        x: (N, C, H, W) float32, or bfloat16 for half; fastest in channels_last.
        packed: of `pack_conv3x3`.
        bias: (K,) float32.
        relu: put 0 where the result is negative.

    Returns:
        (N, K, H, W) in the type of x, channels_last.

    Raises:
        RuntimeError: shapes or types do not fit.
    """
    return torch.ops.refdet.conv3x3(x, packed.weight, packed.scale, bias, relu)


def pack_conv1x1(weight: Tensor, half: bool = False) -> Packed:
    """Weights (K, C), float32, as `conv1x1` takes them.

    Raises:
        RuntimeError: see `pack_conv3x3`.
    """
    return Packed(*torch.ops.refdet.pack_conv1x1(weight.detach(), half))


def conv1x1(x: Tensor, packed: Packed, bias: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
    """``F.conv2d(x, weight[:, :, None, None], bias) + shortcut`` within rounding.

    Args:
        x: (N, C, H, W) float32, or bfloat16 for half; fastest in channels_last.
        packed: of `pack_conv1x1`.
        bias: (K,) float32.
        shortcut: (N, K, H, W) in the type of x; fastest in channels_last.
        relu: put 0 where the result is negative.

    Returns:
        (N, K, H, W) in the type of x, channels_last.

    Raises:
        RuntimeError: shapes or types do not fit.
    """
    return torch.ops.refdet.conv1x1(x, packed.weight, packed.scale, bias, shortcut, relu)


if DEVICES:

    def _packed_fake(weight: Tensor, matrices: int, half: bool) -> tuple[Tensor, Tensor]:
        channels, inputs = weight.shape[:2]
        dtype = torch.float16 if half else torch.float32
        shape = (matrices, channels // OUTPUTS[half], inputs, OUTPUTS[half])
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

    @torch.library.register_fake("refdet::conv1x1")
    def _conv1x1_fake(
        x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        return _convolved_fake(x, weight)
