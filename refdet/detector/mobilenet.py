"""MobileNet v1 (Howard et al., "MobileNets", 2017) with the strides of the reference's detectors.

Shape shorthand in this module:

    B: images in the batch, of height H and width W
    N: images or RoIs
    Cin, C: input and output channels
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from refdet.detector.backbone_channels import mobilenet_channels
from refdet.detector.resnet import Norm, conv_norm

# channels and stride of each layer after the first; the last two run on RoIs, with stride 1
LAYERS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 1), (1024, 1),
)  # fmt: skip
NUM_ROI_LAYERS = 2  # last layers that run on RoIs
STAGE_ENDS = (3, 5, 11)  # indices of the last layers whose output has stride 4, 8 and 16; the first layer is 0
NUM_FROZEN_LAYERS = 5  # first layers, which are not trained in recipes with frozen norms


class ConvNormReLU6(nn.Sequential):
    """A convolution without bias, a norm, and min(max(x, 0), 6)."""

    def __init__(self, in_channels: int, channels: int, size: int, stride: int, groups: int, norm: Norm) -> None:
        convolution = nn.Conv2d(in_channels, channels, size, stride, size // 2, groups=groups, bias=False)
        if groups == 1:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        else:  # depthwise: a filter has one input and one output channel, but fan_out counts all output channels
            nn.init.kaiming_normal_(convolution.weight, mode="fan_in", nonlinearity="relu")
        super().__init__(convolution, norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """X (N, Cin, H, W) -> (N, C, H / stride, W / stride)."""
        return F.relu6(conv_norm(self[0], self[1], x), inplace=True)


class SeparableConv(nn.Module):
    """Depthwise separable convolution: a depthwise 3x3 and a 1x1 convolution, each followed by a norm and ReLU6."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.depthwise = ConvNormReLU6(in_channels, in_channels, size=3, stride=stride, groups=in_channels, norm=norm)
        self.pointwise = ConvNormReLU6(in_channels, channels, size=1, stride=1, groups=1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, Cin, H, W) -> (N, C, H / stride, W / stride)."""
        return self.pointwise(self.depthwise(x))


class MobileNetV1(nn.Module):
    """Twelve layers on images, and `layer4`, the two that a detector runs on RoIs.

    Args:
        width: channels of the first layer: 32 times the depth multiplier.
        norm: constructor of a norm layer, given the number of channels.
    """

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        widths = [width, *(mobilenet_channels(channels, width) for channels, _ in LAYERS)]
        layers: list[nn.Module] = [ConvNormReLU6(3, width, size=3, stride=2, groups=1, norm=norm)]
        for index, (_, stride) in enumerate(LAYERS):
            layers.append(SeparableConv(widths[index], widths[index + 1], stride, norm))
        self.layers = nn.Sequential(*layers[:-NUM_ROI_LAYERS])
        self.layer4 = nn.Sequential(*layers[-NUM_ROI_LAYERS:])
        self.channels = (*(widths[end] for end in STAGE_ENDS), widths[-1])

    def frozen_layers(self) -> list[nn.Module]:
        """Layers that are not trained in recipes with frozen norms."""
        return list(self.layers[:NUM_FROZEN_LAYERS])

    def forward(self, images: Tensor, stages: int) -> list[Tensor]:
        """The first `stages` of the feature maps of strides 4, 8 and 16.

        Args:
            images: (B, 3, H, W), normalized.
            stages: number of maps, 1 to 3.

        Returns:
            Feature maps (B, channels[i], H / s, W / s), rounded up.
        """
        x, maps = images, []
        for index, layer in enumerate(self.layers[: STAGE_ENDS[stages - 1] + 1]):
            x = layer(x)
            if index in STAGE_ENDS:
                maps.append(x)
        return maps
