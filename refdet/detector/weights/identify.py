"""Identify the network of another program's weights and convert them.

Supports ImageNet ResNets in Caffe and torchvision style, and the networks that `reference`, `detectron2`, `torchvision`
and `imagenet` of this package identify.
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
# The first convolution's output variance / squared norm of its filters, which is proportional to the variance of the
# network's input: hundreds or more for Caffe's (0..255, variance 58 ** 2), a few for torchvision's (normalized,
# variance 1). Above this value, the weights are taken for Caffe's.
MIN_CAFFE_GAIN = 100.0


def identify_checkpoint(tensors: Mapping[str, Tensor], weight_format: str | None = None) -> ConvertedWeights:
    """Identify the network of another program's tensors and convert them.

    Args:
        tensors: name -> tensor.
        weight_format: "caffe" or "torchvision" for an ImageNet network, one of `reference.WEIGHT_FORMATS` for a
            detector with the reference's names; None to detect it.

    Raises:
        InputError: unknown network; the message lists missing and unexpected tensors.
    """
    state_dict = rename_tensors(tensors, lambda name: name.removeprefix("module."))  # DataParallel adds the prefix
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
        return _convert_resnet(detectron2.to_torchvision_names(state_dict), weight_format, caffe_recipe="d2-c4")
    for program in (detectron2, torchvision):
        if program.is_detector(state_dict):
            if weight_format is not None:
                raise InputError(f"`weight_format` {weight_format}: not valid for this detector; omit it")
            return program.identify(state_dict)
    if imagenet.is_network(state_dict):
        return imagenet.identify(state_dict, weight_format)
    return _convert_resnet(state_dict, weight_format)


def _convert_resnet(
    state_dict: dict[str, Tensor], weight_format: str | None, caffe_recipe: str = "reference-c4"
) -> ConvertedWeights:
    """Convert an ImageNet ResNet.

    Args:
        state_dict: tensors with torchvision's names.
        weight_format: "caffe" or "torchvision"; None to detect it.
        caffe_recipe: recipe for Caffe style, without the "-res" and depth at the end of its name.
    """
    depth = resnet_depth(state_dict, "")
    if weight_format is None:  # Caffe's ResNets have 50 layers or more
        weight_format = "torchvision" if depth < 50 else _detect_weight_format(state_dict)
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
    """Tell Caffe from torchvision style, whose tensors have the same names and shapes.

    Batch norms have a batch counter since PyTorch 0.4, which is later than the conversions from Caffe. Without a
    counter, the variances of the first norm show the range of the input (`MIN_CAFFE_GAIN`).
    """
    if any(name.endswith("num_batches_tracked") for name in state_dict):
        return "torchvision"
    weight, variance = state_dict.get("conv1.weight"), state_dict.get("bn1.running_var")
    if weight is None or variance is None or weight.shape[1:] != (3, 7, 7) or variance.shape != weight.shape[:1]:
        return "caffe"  # an invalid file, which is reported later
    filters = weight.float().flatten(1).square().sum(1)
    gain = (variance.float() / filters.clamp(min=1e-12)).median().item()
    has_no_variance = bool((variance == 1).all())  # as from `detectron2.to_torchvision_names`: Caffe2's norms have none
    return "caffe" if gain > MIN_CAFFE_GAIN or has_no_variance else "torchvision"
