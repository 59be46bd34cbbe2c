"""Build the backbone of a recipe."""

from __future__ import annotations

from typing import TypeAlias

from refdet.config.recipe import ModelOptions
from refdet.detector.mobilenet import MobileNetV1
from refdet.detector.resnet import Norm, ResNet
from refdet.detector.roi_heads import POOL_SIZE
from refdet.detector.vgg import VGG16

Backbone: TypeAlias = ResNet | VGG16 | MobileNetV1


def build_backbone(model: ModelOptions, norm: Norm) -> Backbone:
    """Build a backbone with random weights.

    Args:
        model: the recipe's options.
        norm: constructor of a norm layer, given the number of channels.
    """
    if model.backbone == "vgg16":
        return VGG16(model.width)
    if model.backbone == "mobilenet_v1":
        return MobileNetV1(model.width, norm)
    pyramid, dilated = model.neck == "fpn", model.neck == "dc5"
    # conv5 of a C4 head outputs 7x7 bins: from 7x7 pooled ones with stride 1, from 14x14 with stride 2
    conv5_stride = model.pooler_resolution // POOL_SIZE if model.neck == "c4" else 1
    strides = (1, 2, 2, 2) if pyramid else (1, 2, 2 if model.stride == 16 else 1, conv5_stride)
    return ResNet(
        model.depth,
        model.width,
        norm,
        strides,
        stride_in_1x1=model.stride_in_1x1,
        dilation=2 if dilated else 1,
        zero_init_residual=model.zero_init_residual,
    )
