"""3x3 convolutions of a network in use: the compiled kernel, by Winograd's minimal filtering, and PyTorch's own.

The kernel needs a third of the multiplications (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
2016). Its sums are float32; what comes out is about twice as far from the exact result as that of PyTorch's
convolution, some 2e-6 of a result's standard deviation with 512 channels. Of each image it is the same bits, whatever
else is in its batch. Stride 1, one row of zeros around the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refdet.ops._library import DEVICES

CHANNELS = 16  # input and output channels are multiples of it
WORTHWHILE = 64  # channels below which PyTorch's own convolution is the faster one


def has_conv3x3(device: torch.device) -> bool:
    """Whether there is a kernel for tensors of a device: on processors with AVX2."""
    return device.type == "cpu" and "cpu" in DEVICES and torch.ops.refdet.has_conv3x3()


def pack_conv3x3(weight: Tensor) -> Tensor:
    """Weights (K, C, 3, 3), float32, as `conv3x3` takes them: (36, K / 16, C, 16), four times as large.

    Raises:
        RuntimeError: channels are not multiples of 16, the weights are not float32, or there is no kernel.
    """
    return torch.ops.refdet.pack_conv3x3(weight.detach())


def conv3x3(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` within rounding; no gradient flows.

    Args:
        x: (N, C, H, W) float32, fastest in channels_last.
        packed: of `pack_conv3x3`.
        bias: (K,) float32.
    Returns:
        (N, K, H, W) float32, channels_last.

    Raises:
        RuntimeError: shapes or types do not fit.
    """
    return torch.ops.refdet.conv3x3(x, packed, bias)


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 that is only used; made of one that may have been trained.

    Args:
        convolution: is not changed; `takes` says which ones will do.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        bias = convolution.bias
        self.register_buffer("weight", pack_conv3x3(convolution.weight))
        self.register_buffer("bias", torch.zeros(self.out_channels) if bias is None else bias.detach().clone())

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is a convolution for which the kernel is there and faster."""
        return (
            isinstance(module, nn.Conv2d)
            and module.weight.dtype == torch.float32
            and has_conv3x3(module.weight.device)
            and module.kernel_size == (3, 3)
            and module.stride == module.padding == module.dilation == (1, 1)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and min(module.in_channels, module.out_channels) >= WORTHWHILE
            and module.in_channels % CHANNELS == module.out_channels % CHANNELS == 0
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, K, H, W), in the type of x; the arithmetic is float32 whatever that is."""
        return conv3x3(x.float(), self.get_buffer("weight"), self.get_buffer("bias")).to(x.dtype)


if DEVICES:

    @torch.library.register_fake("refdet::pack_conv3x3")
    def _pack_conv3x3_fake(weight: Tensor) -> Tensor:
        channels, inputs = weight.shape[:2]
        return weight.new_empty((36, channels // CHANNELS, inputs, CHANNELS))

    @torch.library.register_fake("refdet::conv3x3")
    def _conv3x3_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        images, _, height, width = x.shape
        shape = (images, weight.shape[1] * CHANNELS, height, width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
