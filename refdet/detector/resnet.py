"""ResNet (He et al., "Deep residual learning", 2015) of any width.

Shape shorthand in this module:

    B: images in the batch
    N: images or RoIs
    Cin: input channels
    C: output channels; in a bottleneck, the channels of its 3x3 convolution
    H, W: height and width of the input
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.detector.conv2d import Conv2d
from refdet.ops.epilogue import HALF_DTYPES
from refdet.ops.scaled_weight import scaled_weight
from refdet.ops.training_convolution import conv2d
from refdet.ops.training_epilogue import bias_relu, compute_dtype, is_fused_training

# depth -> number of blocks in each of the four stages
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

Norm = Callable[[int], nn.Module]
"""Constructor of a norm layer, given the number of channels."""


class _FoldedNorm(NamedTuple):
    """Cached result of `FrozenBatchNorm.fold`.

    Attributes:
        sources: the tensors it was computed from, each with its version (PyTorch's count of in-place writes) then.
        dtype: dtype of the factor or of the folded weights.
        factor: (C, 1, 1, 1) scale, if the weights are trained; None for frozen weights.
        weight: (C, Cin, k, k) folded weights, if they are frozen; None for trained weights.
        bias: (C,) folded bias.
    """

    sources: tuple[tuple[Tensor, int], ...]
    dtype: torch.dtype
    factor: Tensor | None
    weight: Tensor | None
    bias: Tensor

    def is_valid(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether this was computed from these tensors, which have not been written to since, for this dtype."""
        if dtype != self.dtype or len(tensors) != len(self.sources):
            return False
        pairs = zip(self.sources, tensors, strict=True)
        return all(source is tensor and version == tensor._version for (source, version), tensor in pairs)


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and affine parameters, in buffers with the same names as in BatchNorm2d."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self._folded: _FoldedNorm | None = None

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> (N, C, H, W), in the dtype of x; computed in float32."""
        mean, variance, weight, bias = map(self.get_buffer, ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)

    def fold(self, weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Fold this norm into the convolution before it.

        What training does not change is cached: the scale and the bias, and the folded weights if they are frozen.

        Args:
            weight: weights (C, Cin, k, k) of the convolution, which has no bias.
            dtype: of the result's weights; by default, that of `weight`.

        Returns:
            Weights (C, Cin, k, k) and bias (C,) of one convolution equal to the convolution and this norm.
        """
        dtype = dtype or weight.dtype
        buffers = list(self.buffers())
        is_trained = weight.requires_grad
        sources, cached_dtype = (buffers, weight.dtype) if is_trained else ([weight, *buffers], dtype)
        folded = self._folded
        if folded is None or not folded.is_valid(sources, cached_dtype):
            with torch.no_grad():
                norm_weight, norm_bias, mean, variance = (buffer.double() for buffer in buffers)
                scale = norm_weight * (variance + self.eps).rsqrt()
                bias = (norm_bias - mean * scale).to(weight.dtype)
                factor = scale.to(weight.dtype)[:, None, None, None]
                versions = tuple((tensor, tensor._version) for tensor in sources)
                if is_trained:
                    folded = _FoldedNorm(versions, cached_dtype, factor, None, bias)
                else:
                    folded = _FoldedNorm(versions, cached_dtype, None, (weight * factor).to(dtype), bias)
            self._folded = folded
        if folded.weight is not None:
            return folded.weight, folded.bias
        assert folded.factor is not None
        return scaled_weight(weight, folded.factor, dtype), folded.bias


def conv_norm(convolution: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(convolution(x))``; in training, a frozen norm is folded into the convolution.

    Folding saves a forward and a backward pass over the maps, and the memory of the convolution's output.
    """
    if not (torch.is_grad_enabled() and isinstance(norm, FrozenBatchNorm) and isinstance(convolution, nn.Conv2d)):
        return norm(convolution(x))
    weight, bias = norm.fold(convolution.weight)
    return _convolve(convolution, x, weight, bias)


def conv_norm_relu(convolution: nn.Module, norm: nn.Module, x: Tensor, pool: nn.Module | None = None) -> Tensor:
    """``pool(relu(norm(convolution(x))))``; in training on a GPU, one pass adds a frozen norm's bias and applies ReLU.

    In that pass max pooling comes before the bias and ReLU, with which it commutes: they process a smaller map.
    """
    if not _is_fused_training(convolution, norm, x):
        y = relu(conv_norm(convolution, norm, x))
        return y if pool is None else pool(y)
    y, bias = _conv_and_bias(convolution, norm, x)
    return bias_relu(y if pool is None else pool(y), bias)


def conv_norm_add_relu(
    convolution: nn.Module, norm: nn.Module, x: Tensor, downsample: nn.Module, block_input: Tensor
) -> Tensor:
    """``relu(norm(convolution(x)) + downsample(block_input))``, the end of a block; fused as in `conv_norm_relu`."""
    if not _is_fused_training(convolution, norm, x):
        return add_relu(conv_norm(convolution, norm, x), downsample(block_input))
    y, bias = _conv_and_bias(convolution, norm, x)
    # add the shortcut's bias in the same pass; not in float32, where summing the two biases would change the rounding
    if (
        isinstance(downsample, Shortcut)
        and y.dtype in HALF_DTYPES
        and _is_fused_training(downsample[0], downsample[1], block_input)
    ):
        shortcut, shortcut_bias = _conv_and_bias(downsample[0], downsample[1], block_input)
        return bias_relu(y, bias + shortcut_bias, shortcut)
    return bias_relu(y, bias, downsample(block_input))


def _is_fused_training(convolution: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    """Whether to fold the norm, as it is frozen, and to train with the fused pass for its bias and ReLU."""
    return isinstance(norm, FrozenBatchNorm) and isinstance(convolution, nn.Conv2d) and is_fused_training(x.device)


def _conv_and_bias(convolution: nn.Module, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, without bias, of a convolution with a frozen norm folded into it; and the bias (C,) to add."""
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, FrozenBatchNorm)
    weight, bias = norm.fold(convolution.weight, compute_dtype(x.device, convolution.weight.dtype))
    return _convolve(convolution, x, weight, None), bias


def _convolve(convolution: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a convolution with the given weights and bias instead of its own."""
    assert not isinstance(convolution.padding, str)
    return conv2d(x, weight, bias, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)


def relu(x: Tensor) -> Tensor:
    """ReLU in place; x must be the output of a convolution or norm, as their gradients do not need it."""
    return x.relu_()


def add_relu(x: Tensor, shortcut: Tensor) -> Tensor:
    """``relu(x + shortcut)`` of (N, C, H, W), in place; x must be the output of a convolution or norm, as in `relu`."""
    return x.add_(shortcut).relu_()


class Shortcut(nn.Sequential):
    """A 1x1 convolution and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        """X (N, Cin, H, W) -> (N, C, H / stride, W / stride)."""
        return conv_norm(self[0], self[1], x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, for ResNet-18 and 34; ``stride_in_1x1`` has no effect."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm, stride_in_1x1: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = _shortcut(in_channels, channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, Cin, H, W) -> (N, C, H / stride, W / stride)."""
        y = conv_norm_relu(self.conv1, self.bn1, x)
        return conv_norm_add_relu(self.conv2, self.bn2, y, self.downsample, x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is in the 3x3 (torchvision) or first 1x1 (Caffe)."""

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm: Norm, stride_in_1x1: bool, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 1, stride if stride_in_1x1 else 1, bias=False)
        self.bn1 = norm(channels)
        stride_3x3 = 1 if stride_in_1x1 else stride
        self.conv2 = Conv2d(channels, channels, 3, stride_3x3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = norm(channels * self.expansion)
        self.downsample = _shortcut(in_channels, channels * self.expansion, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, Cin, H, W) -> (N, 4C, H / stride, W / stride)."""
        y = conv_norm_relu(self.conv1, self.bn1, x)
        y = conv_norm_relu(self.conv2, self.bn2, y)
        return conv_norm_add_relu(self.conv3, self.bn3, y, self.downsample, x)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """The identity if a block does not change the shape, else a `Shortcut`."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return Shortcut(Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class ResNet(nn.Module):
    """Stem and stages of a ResNet.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the first stage (64 in the paper).
        norm: constructor of a norm layer, given the number of channels.
        strides: stride of each of the four stages.
        stride_in_1x1: put the stride of a bottleneck in its first 1x1 convolution; no effect on basic blocks.
        dilation: dilation of the 3x3 convolutions of the last stage; above 1 it needs bottlenecks (depth 50 or more).
        zero_init_residual: initialize the weight of the last norm of each block to zero, unless it is frozen.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        norm: Norm,
        strides: tuple[int, int, int, int],
        stride_in_1x1: bool = False,
        dilation: int = 1,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        block = BasicBlock if depth < 50 else Bottleneck
        self.conv1: nn.Module = Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        self.channels = tuple(width * 2**stage * block.expansion for stage in range(4))
        in_channels = width
        for stage, (count, stride) in enumerate(zip(BLOCKS[depth], strides, strict=True)):
            dilated = {"dilation": dilation} if stage == 3 and dilation > 1 else {}
            blocks: list[nn.Module] = []
            for index in range(count):
                block_stride = stride if index == 0 else 1
                blocks.append(block(in_channels, width * 2**stage, block_stride, norm, stride_in_1x1, **dilated))
                in_channels = self.channels[stage]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        _initialize(self, zero_init_residual)

    def frozen_layers(self) -> list[nn.Module]:
        """Layers that are not trained in recipes with frozen norms, as with FREEZE_AT=2 in detectron2."""
        return [self.conv1, self.get_submodule("layer1")]

    def forward(self, images: Tensor, stages: int) -> list[Tensor]:
        """Feature maps of the first `stages` stages.

        Args:
            images: (B, 3, H, W), normalized.
            stages: number of stages to run, 1 to 4.

        Returns:
            Feature maps (B, channels[i], H / s, W / s), rounded up, where s is 4 times the product of the strides of
            stages 0 to i.
        """
        x = conv_norm_relu(self.conv1, self.bn1, images, self.maxpool)
        maps = []
        for stage in range(stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            maps.append(x)
        return maps


def _initialize(network: nn.Module, zero_init_residual: bool) -> None:
    """Initialize convolutions as in He et al. (2015).

    With `zero_init_residual` the last norm of each block starts at zero, and so the block as its shortcut: recommended
    by Goyal et al., "Accurate, large minibatch SGD", section 5.1, but in the few hundred steps of
    `benchmarks/learning.py` a network learns less with it.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        last = {BasicBlock: "bn2", Bottleneck: "bn3"}.get(type(module)) if zero_init_residual else None
        if last and isinstance(norm := module.get_submodule(last), nn.BatchNorm2d):
            nn.init.zeros_(norm.weight)
