"""Names of the backbones and numbers of their channels. Does not import torch."""

from __future__ import annotations

from refdet.config.recipe import ModelOptions

MOBILENET_WIDTH = 32  # channels of the first convolution of the published MobileNet v1, with depth multiplier 1
_MIN_MOBILENET_CHANNELS = 8  # of a layer
_NAMES_AND_WIDTHS = {"vgg16": ("VGG-16", 64), "mobilenet_v1": ("MobileNet v1", MOBILENET_WIDTH)}  # as published


def network_name(model: ModelOptions) -> str:
    """Human-readable name of the backbone, such as "ResNet-50" or "VGG-16 of width 32"."""
    name, published_width = _NAMES_AND_WIDTHS.get(model.backbone, (f"ResNet-{model.depth}", 64))
    return name if model.width == published_width else f"{name} of width {model.width}"


def vgg_channels(width: int) -> tuple[int, int, int]:
    """Channels of the maps of strides 4, 8 and 16 of a VGG-16 whose first layer has `width` channels."""
    return 4 * width, 8 * width, 8 * width


def mobilenet_channels(channels: int, width: int) -> int:
    """Channels of a MobileNet v1 layer that has `channels` in the paper, if the first layer has `width` channels.

    The depth multiplier of Howard et al., "MobileNets", 2017 is ``width / 32``.
    """
    return max(channels * width // MOBILENET_WIDTH, _MIN_MOBILENET_CHANNELS)


def roi_channels(model: ModelOptions) -> tuple[int, int]:
    """Channels of the map that RoIs are pooled from, and of fc7."""
    if model.backbone == "vgg16":
        return vgg_channels(model.width)[2], model.fc_dim
    if model.backbone == "mobilenet_v1":
        return mobilenet_channels(512, model.width), mobilenet_channels(1024, model.width)
    conv2 = model.width * (4 if model.depth >= 50 else 1)  # bottlenecks expand their channels four times
    conv4, conv5 = conv2 * 4, conv2 * 8
    pooled = {"c4": conv4, "dc5": conv5, "fpn": model.fpn_channels}[model.neck]
    return pooled, conv5 if model.neck == "c4" else model.fc_dim
