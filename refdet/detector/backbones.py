"""Names and widths of the backbones. No torch."""

from __future__ import annotations

from refdet.config.recipe import ModelOptions

MOBILENET_WIDTH = 32  # channels of the first convolution of the published MobileNet v1, whose multiplier is 1
_MIN_CHANNELS = 8  # of a layer of a MobileNet
_NAMES = {"vgg16": ("VGG-16", 64), "mobilenet_v1": ("MobileNet v1", MOBILENET_WIDTH)}  # and the published width


def network_name(model: ModelOptions) -> str:
    """The backbone in words, such as "ResNet-50" or "VGG-16 of width 32"."""
    name, usual = _NAMES.get(model.backbone, (f"ResNet-{model.depth}", 64))
    return name if model.width == usual else f"{name} of width {model.width}"


def vgg_channels(width: int) -> tuple[int, int, int]:
    """Channels of the maps of strides 4, 8 and 16 of a VGG-16 whose first layer has `width`."""
    return 4 * width, 8 * width, 8 * width


def mobilenet_channels(channels: int, width: int) -> int:
    """Channels of a layer that has `channels` in the published MobileNet v1, with `width` in the first layer.

    The depth multiplier of Howard et al., "MobileNets", 2017 is ``width / 32``.
    """
    return max(channels * width // MOBILENET_WIDTH, _MIN_CHANNELS)


def roi_channels(model: ModelOptions) -> tuple[int, int]:
    """Channels of the map that RoIs are pooled from, and of fc7."""
    if model.backbone == "vgg16":
        return vgg_channels(model.width)[2], model.fpn_hidden
    if model.backbone == "mobilenet_v1":
        return mobilenet_channels(512, model.width), mobilenet_channels(1024, model.width)
    first = model.width * (4 if model.depth >= 50 else 1)  # of the first stage; bottlenecks expand four times
    pooled = {"fpn": model.fpn_channels, "dc5": first * 8}.get(model.neck, first * 4)
    return pooled, first * 8 if model.neck == "c4" else model.fpn_hidden
