"""Optimizations for inference: batch norms folded into convolutions, fused and repacked layers.

In eval mode a norm is a scale and a shift per channel and the convolution before it is linear, so ``norm(conv(x))``
is one convolution with scaled weights and a bias. Outputs are the same within rounding.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from refdet.detector.fused_layers import FusedConv2d, FusedStem
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.packed_layers import FusedBottleneck, pack_layers
from refdet.detector.res5_head import SplitRes5, can_split
from refdet.detector.resnet import Bottleneck, FrozenBatchNorm, ResNet, Shortcut
from refdet.detector.roi_heads import C4Head, StandardHead
from refdet.detector.roi_predictors import MaskPredictor
from refdet.detector.rpn import RegionProposalNetwork
from refdet.detector.vgg import VGG16
from refdet.ops.convolution import is_half_fastest
from refdet.ops.epilogue import Epilogue, best_epilogue

# module type -> attributes that are convolutions, or lists of them, which the module calls through `conv_relu`
FOLLOWED_BY_RELU: dict[type[nn.Module], tuple[str, ...]] = {
    FusedBottleneck: ("conv1", "conv2", "conv3"),
    SplitRes5: ("conv2", "conv3"),
    RegionProposalNetwork: ("conv", "more"),
    StandardHead: ("convs",),
    VGG16: ("convs",),
}


def optimize_for_inference(model: MaskRCNN, bf16: bool = False, epilogue: Epilogue | None = None) -> MaskRCNN:
    """Fuse and repack layers for inference; the outputs are the same within rounding.

    Folds norms, runs conv5's first convolutions before pooling where pooling is linear (`refdet.detector.res5_head`),
    replaces layers by compiled kernels on CPUs (`refdet.detector.packed_layers`) and by fused ones on GPUs
    (`refdet.detector.fused_layers`), and converts weights to channels_last.

    Args:
        model: on the device where it will run. Modified in place; it must not be trained or saved afterwards, as its
            state dict can no longer be loaded elsewhere.
        bf16: compute in bfloat16; the box predictor and the anchors stay float32.
        epilogue: how bias, shortcut and ReLU follow a convolution; None for the best on the model's device.
    """
    fuse_conv_bn(model.eval())
    head = model.get_submodule("head")
    # crop_align and crop_max take a maximum over samples, which does not commute with convolutions
    if isinstance(head, C4Head) and head.model.pooling not in ("crop_align", "crop_max") and can_split(head.conv5):
        head.conv5 = SplitRes5(nn.Sequential(*head.conv5.children()))
    if bf16:
        rpn = model.rpn
        parts: list[nn.Module] = [model.backbone, rpn.conv, rpn.more, rpn.score, rpn.delta]  # anchors stay float32
        if model.neck is not None:
            parts.append(model.neck)
        parts += [part for name, part in head.named_children() if name != "box"]
        for part in parts:
            part.to(torch.bfloat16)
    model.to(memory_format=torch.channels_last)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Bottleneck):
                setattr(parent, name, FusedBottleneck(child))
    weight = next(model.parameters())
    epilogue = epilogue or best_epilogue(weight.device, weight.dtype)
    if epilogue is not Epilogue.PLAIN:
        fuse_epilogues(model, epilogue)
    half = bf16 and is_half_fastest(weight.device)  # multiply bfloat16 layers in float16
    # MaskPredictor indexes the weights of its last layer, which packing would rearrange
    keep = [module.logits for module in model.modules() if isinstance(module, MaskPredictor)]
    pack_layers(model, half, frozenset(keep))
    return model


@torch.no_grad()
def fuse_epilogues(model: MaskRCNN, epilogue: Epilogue) -> None:
    """Replace the convolutions followed by a ReLU with `FusedConv2d`, and the stem with `FusedStem`.

    Args:
        model: a network with folded norms, whose bottlenecks are `FusedBottleneck`.
        epilogue: any but `Epilogue.PLAIN`.
    """
    backbone = model.backbone
    if isinstance(backbone, ResNet):
        stem, pool = backbone.conv1, backbone.maxpool
        if isinstance(stem, nn.Conv2d) and isinstance(pool, nn.MaxPool2d) and FusedConv2d.supports(stem):
            backbone.conv1, backbone.maxpool = FusedStem(stem, pool), nn.Identity()
    fuse_blocks(model, epilogue)


@torch.no_grad()
def fuse_blocks(module: nn.Module, epilogue: Epilogue) -> None:
    """`fuse_epilogues` for the modules listed in `FOLLOWED_BY_RELU`, anywhere in a module.

    The bias of a block's shortcut is moved into the bias of its conv3, which is added to the same sum.
    """
    for parent in list(module.modules()):
        if isinstance(parent, FusedBottleneck) and isinstance(parent.downsample, Shortcut):
            shortcut = parent.downsample[0]
            if isinstance(shortcut, nn.Conv2d) and shortcut.bias is not None and parent.conv3.bias is not None:
                parent.conv3.bias.add_(shortcut.bias)
                shortcut.bias = None
        for name in FOLLOWED_BY_RELU.get(type(parent), ()):
            child = getattr(parent, name)
            if isinstance(child, nn.ModuleList):
                for index, layer in enumerate(child):
                    if isinstance(layer, nn.Conv2d) and FusedConv2d.supports(layer):
                        child[index] = FusedConv2d(layer, epilogue)
            elif FusedConv2d.supports(child):
                setattr(parent, name, FusedConv2d(child, epilogue))
        if isinstance(parent, SplitRes5):
            parent.fuse()


@torch.no_grad()
def fuse_conv_bn(model: nn.Module) -> None:
    """Fold the norms of a model in eval mode into the convolutions before them.

    Args:
        model: modified in place. Each norm ``bnX`` follows the convolution ``convX``, or the module before it in a
            `Sequential`.
    """
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        names = list(children)
        for name, norm in children.items():
            if not isinstance(norm, (FrozenBatchNorm, nn.BatchNorm2d)):
                continue
            conv_name = name.replace("bn", "conv") if name.startswith("bn") else names[names.index(name) - 1]
            setattr(parent, conv_name, _fold_norm(children[conv_name], norm))
            setattr(parent, name, nn.Identity())


def _fold_norm(convolution: nn.Module, norm: FrozenBatchNorm | nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution with the norm folded in, computed in float64."""
    if not isinstance(convolution, nn.Conv2d) or convolution.bias is not None:
        raise TypeError(f"cannot fold a norm into {convolution}; a convolution without bias is needed")
    weight, bias, mean, variance = (
        getattr(norm, name).double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (variance + norm.eps).sqrt()
    folded = copy.deepcopy(convolution)
    folded.weight.copy_(convolution.weight.double() * scale[:, None, None, None])
    folded.bias = nn.Parameter((bias - mean * scale).to(convolution.weight.dtype))
    return folded.requires_grad_(False)
