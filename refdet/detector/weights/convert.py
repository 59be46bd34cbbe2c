"""Identify the network of another program's weights and rename its tensors.

Supports ImageNet ResNets in Caffe and torchvision style, and the networks of the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.detector.checkpoint import HEAD_PREFIXES
from refdet.detector.weights import detectron2, imagenet, reference, torchvision
from refdet.detector.weights.fitting import ConvertedWeights, Naming, fit
from refdet.detector.weights.reference import IMAGENET_CLASSIFIER, resnet_depth
from refdet.errors import InputError

RESNET_PARTS = {"head.conv5.": "layer4.", "backbone.": ""}
# Output variance / squared norm of the first filters: hundreds or more for inputs in 0..255 (variance 58 ** 2), a few
# for normalised ones (variance 1), times the correlation of neighbouring pixels.
CAFFE_GAIN = 100.0


def identify_checkpoint(tensors: Mapping[str, Tensor], style: str | None = None) -> ConvertedWeights:
    """Identify the network of another program's tensors.

    Args:
        tensors: name -> tensor.
        style: "caffe" or "torchvision", of an ImageNet network, None to detect it; or one of `reference.STYLES`.

    Raises:
        InputError: unknown network; the message lists missing and unexpected tensors.
    """
    given = {name.removeprefix("module."): value for name, value in tensors.items()}
    if reference.is_detector(given):
        if style not in (None, *reference.STYLES):
            raise InputError(
                f"`style` {style}: this is a detector; only {' and '.join(reference.STYLES)} are a choice for it"
            )
        return reference.identify(given, style)
    if style in reference.STYLES:
        raise InputError(f"`style` {style}: these are not the names of its detectors")
    if detectron2.is_backbone(given):
        return _resnet(detectron2.in_torchvision_names(given), style, caffe="d2-c4")
    detector = next((program.identify for program in (detectron2, torchvision) if program.is_detector(given)), None)
    if detector is not None:
        _refuse_style(style)
        return detector(given)
    return imagenet.identify(given, style) if imagenet.is_network(given) else _resnet(given, style)


def _refuse_style(style: str | None) -> None:
    if style is not None:
        raise InputError(f"`style` {style}: this is a detector without a choice of formats")


def _resnet(given: dict[str, Tensor], style: str | None, caffe: str = "reference-c4") -> ConvertedWeights:
    depth = resnet_depth(given, "")
    style = style or ("torchvision" if depth < 50 else _style(given))
    if style == "caffe":
        if f"{caffe}-res{depth}" not in recipes.names():
            few = f"{depth}" if depth >= 50 else "fewer than 50"
            raise InputError(f"`style='caffe'`: no recipe for a Caffe ResNet of {few} layers")
        recipe = recipes.load(f"{caffe}-res{depth}")
    else:
        name = f"c4-res{depth}" if f"c4-res{depth}" in recipes.names() else "c4-res101"
        recipe = recipes.load(name).with_changes([f"name=c4-res{depth}", f"model.depth={depth}", "model.norm=frozen"])
    tensors = fit(recipe, 0, given, Naming(RESNET_PARTS, {}), IMAGENET_CLASSIFIER, untrained=HEAD_PREFIXES)
    return ConvertedWeights(f"an ImageNet ResNet-{depth} in {style} style", recipe, None, tensors, HEAD_PREFIXES)


def _style(given: Mapping[str, Tensor]) -> str:
    """Caffe or torchvision style, whose tensors have the same names and shapes.

    Batch norms count batches since PyTorch 0.4, later than the conversions from Caffe. Without a counter, the ratio of
    the first norm's variances to its filters gives the range of the input.
    """
    if any(name.endswith("num_batches_tracked") for name in given):
        return "torchvision"
    weight, variance = given.get("conv1.weight"), given.get("bn1.running_var")
    if weight is None or variance is None or weight.shape[1:] != (3, 7, 7) or variance.shape != weight.shape[:1]:
        return "caffe"  # reported later
    filters = weight.float().flatten(1).square().sum(1)
    gain = (variance.float() / filters.clamp(min=1e-12)).median().item()
    untouched = bool((variance == 1).all())
    return "caffe" if gain > CAFFE_GAIN or untouched else "torchvision"
