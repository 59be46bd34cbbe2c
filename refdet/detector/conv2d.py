"""`Conv2d`: a drop-in for torch's that trains faster on CPUs, by `refdet.ops.training_convolution`.

Shape shorthand in this module:

    N: images or RoIs
    C, K: input and output channels
    H, W: height and width of the input (H', W' of the output)
"""

from __future__ import annotations

from torch import Tensor, nn

from refdet.ops.training_convolution import conv2d


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with zero padding; same parameters, and same results within rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> (N, K, H', W')."""
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
