"""conv5 for inference, whose first 1x1 convolutions can run on the feature map before RoI pooling.

Shape shorthand in this module:

    N: images or RoIs
    K: RoIs
    Cin, C: input and output channels of conv5 (C' between `project` and `blocks`)
    H, W: height and width of a feature map
    m: bins on a side of a RoI
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refdet.detector.packed_layers import FusedBottleneck, conv_relu
from refdet.detector.resnet import Bottleneck, relu
from refdet.ops.epilogue import bias_relu


class SplitRes5(nn.Module):
    """A stage of bottlenecks in steps: `project` before or after pooling, then each of `blocks`.

    The first block begins with two 1x1 convolutions, one of them the shortcut. They commute with pooling, as they are
    linear over channels and pooling is linear over positions. A feature map has far fewer positions than hundreds of
    RoIs have bins, so they run on the map. Biases are added after pooling, as bins outside the map are pooled to 0.

    Args:
        stage: bottlenecks of stride 1 whose norms are folded; not modified, except that conv3 of its first block gets
            the bias of the shortcut.
    """

    def __init__(self, stage: nn.Sequential) -> None:
        super().__init__()
        blocks = [block for block in stage if isinstance(block, Bottleneck)]
        if len(blocks) < len(stage) or not can_split(stage):
            raise TypeError(f"a stage of bottlenecks of stride 1 with a shortcut is needed, not {stage}")
        first = blocks[0]
        reduce, shortcut = first.conv1, first.downsample.get_submodule("0")
        assert isinstance(shortcut, nn.Conv2d)
        self.channels = [reduce.out_channels, shortcut.out_channels]
        weight = reduce.weight
        outputs = sum(self.channels)
        self.first_convs = nn.Conv2d(
            reduce.in_channels, outputs, 1, bias=False, device=weight.device, dtype=weight.dtype
        )
        self.conv2, self.conv3 = first.conv2, first.conv3
        self.later_blocks = nn.Sequential(*(FusedBottleneck(block) for block in blocks[1:]))
        assert reduce.bias is not None and shortcut.bias is not None and self.conv3.bias is not None
        with torch.no_grad():
            self.first_convs.weight.copy_(torch.cat((reduce.weight, shortcut.weight)))
            self.conv3.bias.add_(shortcut.bias)
        self.reduce_bias = nn.Parameter(reduce.bias.detach().clone()[:, None, None], requires_grad=False)
        self.reduce_bias_float32: Tensor | None
        self.register_buffer("reduce_bias_float32", None)  # set by `fuse`

    def fuse(self) -> None:
        """Switch to adding the first bias and applying ReLU in one pass, by `refdet.ops.epilogue`."""
        self.reduce_bias_float32 = self.reduce_bias.detach().flatten().float()

    def project(self, x: Tensor) -> Tensor:
        """Feature map or pooled RoIs (N, Cin, H, W) -> (N, C', H, W), the input of `blocks` once it is pooled."""
        return self.first_convs(x)

    def blocks(self) -> list[Callable[[Tensor], Tensor]]:
        """Functions to apply one after another to the pooled output (K, C', m, m) of `project` -> (K, C, m, m).

        A single function would keep its input, the largest activation, in memory until it returns.
        """
        return [self._first_block, *self.later_blocks]

    def _first_block(self, projected: Tensor) -> Tensor:
        reduced, shortcut = projected.split(self.channels, dim=1)
        bias = self.reduce_bias_float32
        reduced = relu(reduced + self.reduce_bias) if bias is None else bias_relu(reduced, bias)
        y = conv_relu(self.conv2, reduced)
        return conv_relu(self.conv3, y, shortcut)


def can_split(stage: nn.Module) -> bool:
    """Whether `SplitRes5` accepts a stage."""
    first = stage[0] if isinstance(stage, nn.Sequential) else None
    if not isinstance(first, Bottleneck) or not isinstance(first.downsample, nn.Sequential):
        return False
    is_folded = isinstance(first.bn1, nn.Identity)
    return is_folded and first.conv1.stride == first.downsample.get_submodule("0").stride == (1, 1)
