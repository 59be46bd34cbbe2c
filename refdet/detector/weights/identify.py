"""Identify the network of another program's weights and convert them.

Supports ImageNet ResNets in Caffe and torchvision style, and the networks of the other modules in this package.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.detector.checkpoint import HEAD_PREFIXES
from refdet.detector.weights import detectron2, imagenet, reference, torchvision
from refdet.detector.weights.conversion import ConvertedWeights, NameMapping, convert_tensors
from refdet.detector.weights.reference import IMAGENET_CLASSIFIER, resnet_depth
from refdet.errors import InputError

RESNET_PREFIXES = {"head.conv5.": "layer4.", "backbone.": ""}
# Output variance / squared norm of the filters of the first convolution, which is proportional to the variance of the
# input: hundreds or more for Caffe's (0..255, variance 58 ** 2), a few for torchvision's (normalized, variance 1).
CAFFE_GAIN = 100.0


def identify_checkpoint(tensors: Mapping[str, Tensor], style: str | None = None) -> ConvertedWeights:
    """Identify the network of another program's tensors.

    Args:
        tensors: name -> tensor.
        style: "caffe" or "torchvision" for an ImageNet network, one of `reference.STYLES` for a detector with the
            reference's names; None to detect it.

    Raises:
        InputError: unknown network; the message lists missing and unexpected tensors.
    """
    state_dict = {name.removeprefix("module."): value for name, value in tensors.items()}
    if reference.is_detector(state_dict):
        if style not in (None, *reference.STYLES):
            raise InputError(
                f"`style` {style}: this is a detector, for which only {' and '.join(reference.STYLES)} are valid"
            )
        return reference.identify(state_dict, style)
    if style in reference.STYLES:
        raise InputError(f"`style` {style}: the tensors do not have the names of its detectors")
    if detectron2.is_backbone(state_dict):
        return _resnet(detectron2.to_torchvision_names(state_dict), style, caffe="d2-c4")
    detector = next(
        (program.identify for program in (detectron2, torchvision) if program.is_detector(state_dict)), None
    )
    if detector is not None:
        _refuse_style(style)
        return detector(state_dict)
    return imagenet.identify(state_dict, style) if imagenet.is_network(state_dict) else _resnet(state_dict, style)


def _refuse_style(style: str | None) -> None:
    if style is not None:
        raise InputError(f"`style` {style}: not valid for this detector; omit it")


def _resnet(state_dict: dict[str, Tensor], style: str | None, caffe: str = "reference-c4") -> ConvertedWeights:
    """Convert an ImageNet ResNet; `caffe` is the start of the name of the recipe for Caffe style."""
    depth = resnet_depth(state_dict, "")
    style = style or ("torchvision" if depth < 50 else _detect_style(state_dict))
    if style == "caffe":
        if f"{caffe}-res{depth}" not in recipes.names():
            layers = f"{depth}" if depth >= 50 else "fewer than 50"
            raise InputError(f"`style='caffe'`: no recipe for a Caffe ResNet of {layers} layers")
        recipe = recipes.load(f"{caffe}-res{depth}")
    else:
        name = f"c4-res{depth}" if f"c4-res{depth}" in recipes.names() else "c4-res101"
        recipe = recipes.load(name).with_changes([f"name=c4-res{depth}", f"model.depth={depth}", "model.norm=frozen"])
    tensors = convert_tensors(
        recipe, 0, state_dict, NameMapping(RESNET_PREFIXES, {}), IMAGENET_CLASSIFIER, missing_prefixes=HEAD_PREFIXES
    )
    return ConvertedWeights(f"an ImageNet ResNet-{depth} in {style} style", recipe, None, tensors, HEAD_PREFIXES)


def _detect_style(state_dict: Mapping[str, Tensor]) -> str:
    """Caffe or torchvision style, whose tensors have the same names and shapes.

    Batch norms have a batch counter since PyTorch 0.4, which is later than the conversions from Caffe. Without one, the
    variances of the first norm show the range of the input (`CAFFE_GAIN`).
    """
    if any(name.endswith("num_batches_tracked") for name in state_dict):
        return "torchvision"
    weight, variance = state_dict.get("conv1.weight"), state_dict.get("bn1.running_var")
    if weight is None or variance is None or weight.shape[1:] != (3, 7, 7) or variance.shape != weight.shape[:1]:
        return "caffe"  # an invalid file, which is reported later
    filters = weight.float().flatten(1).square().sum(1)
    gain = (variance.float() / filters.clamp(min=1e-12)).median().item()
    is_initial = bool((variance == 1).all())
    return "caffe" if gain > CAFFE_GAIN or is_initial else "torchvision"
