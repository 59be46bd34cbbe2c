"""Batch norm folded into convolutions: for a detector that is used and no longer trained.

A norm in eval mode is a scale and a shift for each channel, and the convolution before it is linear, so
``norm(conv(x))`` is one convolution with scaled weights and a bias. What comes out is the same within rounding.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.packed_layers import FusedBottleneck, pack_layers
from refdet.detector.res5_head import SplitRes5, can_enter_early
from refdet.detector.resnet import Bottleneck, FrozenBatchNorm
from refdet.detector.roi_heads import C4Head, MaskPredictor
from refdet.ops.convolution import half_is_quickest


def optimize_for_inference(model: MaskRCNN, bf16: bool = False) -> MaskRCNN:
    """Make of a trained detector one that finds the same and is faster; it is for use alone.

    Norms are folded, conv5 enters early where pooling is linear (see `refdet.detector.res5_head`), layers have kernels
    of their own where there are some (see `refdet.detector.packed_layers`), and weights lie in channels_last.

    Args:
        model: on the device where it will be used. It is changed and must not be trained or saved afterwards: its
            tensors have other names.
        bf16: have the weights, and what flows between them, in bfloat16, all but those that predict classes and boxes.
    """
    fuse_conv_bn(model.eval())
    head = model.get_submodule("head")
    # the largest of several samples is not linear: crop_align must pool first
    if isinstance(head, C4Head) and head.pooling != "crop_align" and can_enter_early(head.conv5):
        head.conv5 = SplitRes5(nn.Sequential(*head.conv5.children()))
    if bf16:
        rpn = model.rpn  # whose anchors are no weights
        parts: list[nn.Module] = [model.backbone, rpn.conv, rpn.score, rpn.delta]
        parts += [part for name, part in model.named_children() if name == "neck"]
        parts += [part for name, part in head.named_children() if name != "box"]
        for part in parts:
            part.to(torch.bfloat16)
    model.to(memory_format=torch.channels_last)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Bottleneck):
                setattr(parent, name, FusedBottleneck(child))
    half = bf16 and half_is_quickest(next(model.parameters()).device)
    # a mask predictor reads the weights of its last layer itself
    keep = [module.logits for module in model.modules() if isinstance(module, MaskPredictor)]
    pack_layers(model, half, frozenset(keep))
    return model


@torch.no_grad()
def fuse_conv_bn(model: nn.Module) -> None:
    """Put the norms of a model, as they are in eval mode, into the convolutions before them.

    Args:
        model: norms stand as ``bnX`` beside the ``convX`` that feeds them, or right after it in a `Sequential`, as in
            `refdet.detector.resnet`.
    """
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        names = list(children)
        for name, norm in children.items():
            if not isinstance(norm, (FrozenBatchNorm, nn.BatchNorm2d)):
                continue
            before = f"conv{name.removeprefix('bn')}" if name.startswith("bn") else names[names.index(name) - 1]
            setattr(parent, before, _with_norm(children[before], norm))
            setattr(parent, name, nn.Identity())


def _with_norm(convolution: nn.Module, norm: FrozenBatchNorm | nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does what a convolution without bias and a norm do; computed in float64."""
    if not isinstance(convolution, nn.Conv2d) or convolution.bias is not None:
        raise TypeError(f"a norm can be folded into a convolution without bias, not into {convolution}")
    values = {name: getattr(norm, name).double() for name in ("weight", "bias", "running_mean", "running_var")}
    scale = values["weight"] / (values["running_var"] + norm.eps).sqrt()
    both = copy.deepcopy(convolution)
    both.weight.copy_(convolution.weight.double() * scale[:, None, None, None])
    both.bias = nn.Parameter((values["bias"] - values["running_mean"] * scale).to(convolution.weight.dtype))
    return both.requires_grad_(False)
