"""The feature pyramid (Lin et al., "Feature Pyramid Networks", 2017).

Shape shorthand in this module:

    B: images in the batch
    Ci, Hi, Wi: channels, height and width of feature map i, finest first
    C: channels of every pyramid level
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from refdet.detector.conv2d import Conv2d


class FeaturePyramid(nn.Module):
    """Five feature maps at strides 4 to 64 from the four stages of a ResNet; the last one subsamples the fourth."""

    strides = (4, 8, 16, 32, 64)

    def __init__(self, in_channels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for convolution in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four feature maps (B, Ci, Hi, Wi), finest first -> five (B, C, Hi, Wi)."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[-2:])
        outputs = [convolution(x) for convolution, x in zip(self.output, merged, strict=True)]
        return [*outputs, outputs[-1][:, :, ::2, ::2]]
