"""Inference layers for CPUs: compiled convolutions fused with the bias, shortcut and ReLU after them.

`conv_relu` applies any convolution and the ReLU after it, packed or not, on any device, in training too.

Shape shorthand in this module:

    N: images or RoIs
    C, K: input and output channels
    H, W: height and width of the input
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refdet.detector.fused_layers import FusedConv2d
from refdet.detector.resnet import Bottleneck, add_relu, relu
from refdet.ops.convolution import (
    CHANNEL_MULTIPLE,
    OUTPUT_MULTIPLE,
    Packed,
    conv1x1,
    conv3x3,
    has_kernels,
    is_pointwise_faster,
    pack_conv1x1,
    pack_conv3x3,
)
from refdet.ops.training_convolution import conv2d
from refdet.ops.training_epilogue import bias_relu, is_fused_training

MIN_CHANNELS = 64  # with fewer, PyTorch's convolution is faster


class PackedLayer(nn.Module):
    """Base class of layers with packed weights.

    Args:
        packed: weights in the layout of the kernels.
        bias: (K,), or None for zeros.
    """

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", packed.weight)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", torch.zeros_like(packed.scale) if bias is None else bias.detach().float().clone())
        self.dtype = torch.bfloat16 if packed.weight.dtype == torch.float16 else torch.float32  # of the kernel's inputs

    def _packed(self) -> tuple[Packed, Tensor]:
        """The packed weights, and the bias (K,)."""
        return Packed(self.get_buffer("weight"), self.get_buffer("scale")), self.get_buffer("bias")

    @staticmethod
    def _weight(layer: nn.Conv2d | nn.Linear | nn.ConvTranspose2d) -> Tensor:
        return layer.weight.detach().float()  # packing takes float32, also for layers in bfloat16


class PackedConv2d(PackedLayer):
    """A 1x1 or 3x3 convolution by a kernel of `refdet.ops.convolution`.

    Args:
        convolution: one that `supports` accepts; not modified.
        half: multiply in float16 instead of float32.
    """

    def __init__(self, convolution: nn.Conv2d, half: bool = False) -> None:
        weight = self._weight(convolution)
        is_pointwise = convolution.kernel_size == (1, 1)
        packed = pack_conv1x1(weight.flatten(1), half) if is_pointwise else pack_conv3x3(weight, half)
        super().__init__(packed, convolution.bias)
        self.is_pointwise, self.stride = is_pointwise, convolution.stride

    @staticmethod
    def supports(module: nn.Module, half: bool = False) -> bool:
        """Whether a module is a convolution for which there is a kernel that is faster than PyTorch."""
        if not isinstance(module, nn.Conv2d) or module.weight.dtype != _dtype(half):
            return False
        device = module.weight.device
        is_1x1 = module.kernel_size == (1, 1) and module.padding == (0, 0) and is_pointwise_faster(device, half)
        is_3x3 = module.kernel_size == (3, 3) and module.stride == module.padding == (1, 1)
        return (
            (is_1x1 or is_3x3)
            and module.dilation == (1, 1)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and _supports_channels(module.in_channels, module.out_channels, device, half)
        )

    def forward(self, x: Tensor, shortcut: Tensor | None = None, apply_relu: bool = False) -> Tensor:
        """X (N, C, H, W) -> (N, K, H / stride, W / stride), in the dtype of x.

        Args:
            x: the input.
            shortcut: added to the output, of the same shape.
            apply_relu: apply ReLU at the end.
        """
        packed, bias = self._packed()
        inputs = x.to(self.dtype)
        if not self.is_pointwise:
            if shortcut is None:
                return conv3x3(inputs, packed, bias, relu=apply_relu).to(x.dtype)
            y = conv3x3(inputs, packed, bias).to(x.dtype) + shortcut
            return relu(y) if apply_relu else y
        if self.stride != (1, 1):
            inputs = inputs[:, :, :: self.stride[0], :: self.stride[1]]
        shortcut = None if shortcut is None else shortcut.to(self.dtype)
        return conv1x1(inputs, packed, bias, shortcut, relu=apply_relu).to(x.dtype)


class PackedLinear(PackedLayer):
    """A linear layer by the kernel of 1x1 convolutions.

    Args:
        linear: one that `supports` accepts; not modified.
        half: multiply in float16 instead of float32.
    """

    def __init__(self, linear: nn.Linear, half: bool = False) -> None:
        super().__init__(pack_conv1x1(self._weight(linear), half), linear.bias)

    @staticmethod
    def supports(module: nn.Module, half: bool = False) -> bool:
        """Whether a module is a linear layer for which the kernel is faster: only with `half`."""
        if not half or type(module) is not nn.Linear or module.weight.dtype != _dtype(half):
            return False
        return _supports_channels(module.in_features, module.out_features, module.weight.device, half)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C) -> (N, K), in the dtype of x."""
        packed, bias = self._packed()
        return conv1x1(x.to(self.dtype)[:, :, None, None], packed, bias).flatten(1).to(x.dtype)


class PackedConvTranspose2x2(PackedLayer):
    """A 2x2 transposed convolution with stride 2 by the kernel of 1x1 convolutions.

    Args:
        convolution: one that `supports` accepts; not modified.
        half: multiply in float16 instead of float32.
    """

    def __init__(self, convolution: nn.ConvTranspose2d, half: bool = False) -> None:
        weight = self._weight(convolution).permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * K, C)
        bias = None if convolution.bias is None else convolution.bias.repeat(4)
        super().__init__(pack_conv1x1(weight.contiguous(), half), bias)

    @staticmethod
    def supports(module: nn.Module, half: bool = False) -> bool:
        """Whether a module is a 2x2 transposed convolution with stride 2 for which the kernel is faster."""
        if type(module) is not nn.ConvTranspose2d or module.weight.dtype != _dtype(half):
            return False
        return (
            module.kernel_size == module.stride == (2, 2)
            and module.padding == module.output_padding == (0, 0)
            and module.dilation == (1, 1)
            and module.groups == 1
            and is_pointwise_faster(module.weight.device, half)
            and _supports_channels(module.in_channels, module.out_channels, module.weight.device, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> (N, K, 2H, 2W), in the dtype of x."""
        packed, bias = self._packed()
        y = conv1x1(x.to(self.dtype), packed, bias).to(x.dtype)
        blocks = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))  # N, H, W, 2, 2, K
        return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class FusedBottleneck(nn.Module):
    """A bottleneck with norms folded into its convolutions.

    Args:
        block: the bottleneck; its layers are shared, not copied.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        if not all(isinstance(norm, nn.Identity) for norm in (block.bn1, block.bn2, block.bn3)):
            raise TypeError("bottleneck: its norms are not folded; call fuse_conv_bn first")
        self.conv1, self.conv2, self.conv3, self.downsample = block.conv1, block.conv2, block.conv3, block.downsample

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> (N, K, H / stride, W / stride)."""
        y = conv_relu(self.conv2, conv_relu(self.conv1, x))
        return conv_relu(self.conv3, y, self.downsample(x))


def conv_relu(convolution: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """``relu(convolution(x) + shortcut)`` of x (N, C, H, W), for an `nn.Conv2d`, `PackedConv2d` or `FusedConv2d`."""
    if isinstance(convolution, PackedConv2d | FusedConv2d):
        return convolution(x, shortcut, apply_relu=True)
    if isinstance(convolution, nn.Conv2d) and convolution.bias is not None and is_fused_training(x.device):
        stride, padding, dilation = convolution.stride, convolution.padding, convolution.dilation
        y = conv2d(x, convolution.weight, None, stride, padding, dilation, convolution.groups)
        return bias_relu(y, convolution.bias, shortcut)
    return relu(convolution(x)) if shortcut is None else add_relu(convolution(x), shortcut)


def pack_layers(model: nn.Module, half: bool, keep: frozenset[nn.Module] = frozenset()) -> None:
    """Replace the layers of a model by packed ones where these are supported and faster.

    Args:
        model: modified in place.
        half: multiply in float16 instead of float32.
        keep: modules to leave as they are.
    """
    for name, child in list(model.named_children()):
        if child in keep:
            continue
        for packed in (PackedConv2d, PackedLinear, PackedConvTranspose2x2):
            if packed.supports(child, half):
                setattr(model, name, packed(child, half))  # type: ignore[arg-type]
                break
        else:
            pack_layers(child, half, keep)


def _supports_channels(inputs: int, outputs: int, device: torch.device, half: bool) -> bool:
    """Whether there is a kernel for these numbers of channels, and it is faster than PyTorch."""
    return (
        min(inputs, outputs) >= MIN_CHANNELS
        and inputs % CHANNEL_MULTIPLE == 0
        and outputs % OUTPUT_MULTIPLE[half] == 0
        and has_kernels(device, half)
    )


def _dtype(half: bool) -> torch.dtype:
    """Dtype of the weights of layers that can be packed."""
    return torch.bfloat16 if half else torch.float32
