"""Inference layers for GPUs: convolutions fused with the bias, shortcut and ReLU after them.

Shape shorthand in this module:

    N: images or RoIs
    C, K: input and output channels
    H, W: height and width of the input
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.ops.epilogue import Epilogue, bias_relu, conv1x1_bias, conv_add_relu

log = logging.getLogger(__name__)


class FusedConv2d(nn.Module):
    """A convolution with an epilogue of `refdet.ops.epilogue`.

    Args:
        convolution: accepted by `supports`; its weight is shared, not copied.
        epilogue: any but `Epilogue.PLAIN`.
    """

    def __init__(self, convolution: nn.Conv2d, epilogue: Epilogue) -> None:
        super().__init__()
        self.weight = convolution.weight
        bias = self.weight.new_zeros(len(self.weight)) if convolution.bias is None else convolution.bias.detach()
        self.register_buffer("bias", bias)  # in the dtype of the weight, for cuDNN and cuBLAS
        self.register_buffer("bias_float32", bias.float())  # for the kernel
        self.stride = tuple(int(n) for n in convolution.stride)
        self.padding = tuple(int(n) for n in convolution.padding)
        self.is_pointwise = convolution.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)
        self.epilogue = epilogue

    @staticmethod
    def supports(module: nn.Module) -> bool:
        """Whether a module is a convolution of one group, without dilation, padded with zeros."""
        return (
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def forward(self, x: Tensor, shortcut: Tensor | None = None, apply_relu: bool = False) -> Tensor:
        """X (N, C, H, W) -> (N, K, H / stride, W / stride).

        Args:
            x: the input.
            shortcut: added to the output, of the same shape.
            apply_relu: apply ReLU at the end.
        """
        bias = self.get_buffer("bias")
        if not apply_relu:
            y = F.conv2d(x, self.weight, bias, self.stride, self.padding)
            return y if shortcut is None else y + shortcut
        is_product = self.is_pointwise and self.epilogue is not Epilogue.KERNEL
        if is_product and shortcut is None:
            return conv1x1_bias(x, self.weight[:, :, 0, 0], bias, relu=True)
        # cuDNN would copy a shortcut that is not channels_last
        is_channels_last = shortcut is not None and shortcut.is_contiguous(memory_format=torch.channels_last)
        if self.epilogue is Epilogue.LIBRARY and shortcut is not None and is_channels_last:
            try:
                return conv_add_relu(x, self.weight, bias, shortcut, self.stride, self.padding)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # "unable to find an engine" or a cuDNN status; other errors have nothing to do with the fusion
                if "engine" not in str(error) and "CUDNN" not in str(error).upper():
                    raise
                log.warning(
                    "note: cuDNN cannot fuse the convolution with weights %s with its shortcut (%s); from now on its "
                    "bias, shortcut and ReLU take one more kernel, which is slower",
                    tuple(self.weight.shape),
                    error,
                )
                self.epilogue = Epilogue.KERNEL
        if is_product:
            y = conv1x1_bias(x, self.weight[:, :, 0, 0], None, relu=False)
        else:
            y = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return bias_relu(y, self.get_buffer("bias_float32"), shortcut)


class FusedStem(nn.Module):
    """The stem of a ResNet, with max pooling before bias and ReLU, which then process a smaller map.

    The result is the same, as max pooling commutes with adding a bias per channel and with ReLU.

    Args:
        convolution: the convolution, with a bias.
        pool: the pooling after its ReLU.
    """

    def __init__(self, convolution: nn.Conv2d, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.weight, self.pool = convolution.weight, pool
        bias = self.weight.new_zeros(len(self.weight)) if convolution.bias is None else convolution.bias.detach()
        self.register_buffer("bias_float32", bias.float())
        self.stride, self.padding = convolution.stride, convolution.padding

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, K, H / 4, W / 4)."""
        y = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return bias_relu(self.pool(y), self.get_buffer("bias_float32"))
