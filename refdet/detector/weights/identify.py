"""Identify the network of another program's weights and convert them.

Supports ImageNet ResNets in Caffe and torchvision style, and the networks of the other modules in this package.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.detector.checkpoint import HEAD_PREFIXES
from refdet.detector.weights import detectron2, imagenet, reference, torchvision
from refdet.detector.weights.conversion import ConvertedWeights, NameMapping, convert_tensors, rename_tensors
from refdet.detector.weights.reference import IMAGENET_CLASSIFIER, resnet_depth
from refdet.errors import InputError

RESNET_PREFIXES = {"head.conv5.": "layer4.", "backbone.": ""}
# Output variance / squared norm of the filters of the first convolution, which is proportional to the variance of the
# input: hundreds or more for Caffe's (0..255, variance 58 ** 2), a few for torchvision's (normalized, variance 1).
CAFFE_GAIN = 100.0


def identify_checkpoint(tensors: Mapping[str, Tensor], weight_format: str | None = None) -> ConvertedWeights:
    """Identify the network of another program's tensors.

    Args:
        tensors: name -> tensor.
        weight_format: "caffe" or "torchvision" for an ImageNet network, one of `reference.WEIGHT_FORMATS` for a
            detector with the reference's names; None to detect it.

    Raises:
        InputError: unknown network; the message lists missing and unexpected tensors.
    """
    state_dict = rename_tensors(tensors, lambda name: name.removeprefix("module."))  # of DataParallel
    if reference.is_detector(state_dict):
        if weight_format not in (None, *reference.WEIGHT_FORMATS):
            raise InputError(
                f"`weight_format` {weight_format}: this is a detector, for which only "
                f"{' and '.join(reference.WEIGHT_FORMATS)} are valid"
            )
        return reference.identify(state_dict, weight_format)
    if weight_format in reference.WEIGHT_FORMATS:
        raise InputError(f"`weight_format` {weight_format}: the tensors do not have the names of its detectors")
    if detectron2.is_backbone(state_dict):
        return _resnet(detectron2.to_torchvision_names(state_dict), weight_format, caffe_recipe="d2-c4")
    for program in (detectron2, torchvision):
        if program.is_detector(state_dict):
            if weight_format is not None:
                raise InputError(f"`weight_format` {weight_format}: not valid for this detector; omit it")
            return program.identify(state_dict)
    if imagenet.is_network(state_dict):
        return imagenet.identify(state_dict, weight_format)
    return _resnet(state_dict, weight_format)


def _resnet(
    state_dict: dict[str, Tensor], weight_format: str | None, caffe_recipe: str = "reference-c4"
) -> ConvertedWeights:
    """Convert an ImageNet ResNet; in Caffe style, its recipe is `caffe_recipe` with the depth appended."""
    depth = resnet_depth(state_dict, "")
    weight_format = weight_format or ("torchvision" if depth < 50 else _detect_weight_format(state_dict))
    if weight_format == "caffe":
        if f"{caffe_recipe}-res{depth}" not in recipes.names():
            raise InputError(
                f"an ImageNet ResNet-{depth} in Caffe style, for which there is no recipe; if it is torchvision's, "
                "give `weight_format='torchvision'`"
            )
        recipe = recipes.load(f"{caffe_recipe}-res{depth}")
    else:
        name = f"c4-res{depth}" if f"c4-res{depth}" in recipes.names() else "c4-res101"
        recipe = recipes.load(name).with_changes([f"name=c4-res{depth}", f"model.depth={depth}", "model.norm=frozen"])
    tensors = convert_tensors(
        recipe, 0, state_dict, NameMapping(RESNET_PREFIXES, {}), IMAGENET_CLASSIFIER, missing_prefixes=HEAD_PREFIXES
    )
    kind = f"an ImageNet ResNet-{depth} in {weight_format} style"
    return ConvertedWeights(kind, recipe, None, tensors, HEAD_PREFIXES)


def _detect_weight_format(state_dict: Mapping[str, Tensor]) -> str:
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
