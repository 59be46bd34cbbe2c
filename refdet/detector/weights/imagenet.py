"""ImageNet VGG-16 and MobileNet v1, the initial weights of detectors of the reference, lichengunc/mask-faster-rcnn."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.detector.checkpoint import HEAD_PREFIXES
from refdet.detector.weights.conversion import ConvertedWeights, NameMapping, convert_tensors
from refdet.detector.weights.reference import mobilenet_changes, mobilenet_prefixes, vgg_changes, vgg_prefixes
from refdet.errors import InputError

# for each network, a tensor that only it has
_VGG, _MOBILENET = "features.26.weight", "Conv2d_13.pointwise.0.weight"
_TORCHVISION_INPUT = (  # changes to the reference's recipe
    "input.order=rgb",
    "input.mean=[123.675,116.28,103.53]",
    "input.std=[58.395,57.12,57.375]",
)


def is_network(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of one of these networks."""
    return _VGG in state_dict or any(name.removeprefix("features.") == _MOBILENET for name in state_dict)


def identify(state_dict: Mapping[str, Tensor], weight_format: str | None) -> ConvertedWeights:
    """Identify a VGG-16 or a MobileNet v1 and convert its weights.

    Args:
        state_dict: name -> tensor.
        weight_format: "caffe" for the reference's preprocessing, "torchvision" for torchvision's; None to detect it.

    Raises:
        InputError: missing or unexpected tensors, or a weight format that cannot be detected.
    """
    if _VGG in state_dict:
        return _convert_vgg(state_dict, weight_format)
    if weight_format == "torchvision":
        raise InputError("`weight_format='torchvision'`: torchvision has no MobileNet v1")
    prefix = "features." if f"features.{_MOBILENET}" in state_dict else ""
    recipe = recipes.load("reference-mobilenet-v1").with_changes(mobilenet_changes(state_dict, prefix))
    tensors = convert_tensors(
        recipe,
        0,  # classes
        state_dict,
        NameMapping(mobilenet_prefixes(prefix), {}),
        _classifier(state_dict),  # ignored
        missing_prefixes=HEAD_PREFIXES,
    )
    return ConvertedWeights("an ImageNet MobileNet v1 in caffe style", recipe, None, tensors, HEAD_PREFIXES)


def _convert_vgg(state_dict: Mapping[str, Tensor], weight_format: str | None) -> ConvertedWeights:
    """Convert a VGG-16; raises InputError if its weight format is not given and cannot be detected."""
    # index of the first linear layer in the classifier: in conversions from Caffe, layer 0 flattens
    fc6 = 1 if "classifier.1.weight" in state_dict else 0
    weight_format = weight_format or ("caffe" if fc6 == 1 else None)
    if weight_format is None:
        raise InputError(
            "an ImageNet VGG-16, whose tensors do not show its preprocessing; give `weight_format='torchvision'` for "
            "torchvision's, `weight_format='caffe'` for one converted from Caffe (BGR, not divided by a standard "
            "deviation)"
        )
    recipe = recipes.load("reference-vgg16")
    changes = vgg_changes(state_dict, "", fc6)
    recipe = recipe.with_changes(changes if weight_format == "caffe" else [*_TORCHVISION_INPUT, *changes])
    prefixes = vgg_prefixes("", fc6)
    unused = [name for name in _classifier(state_dict) if not name.startswith(tuple(prefixes.values()))]
    tensors = convert_tensors(recipe, 0, state_dict, NameMapping(prefixes, {}), unused, missing_prefixes=HEAD_PREFIXES)
    return ConvertedWeights(f"an ImageNet VGG-16 in {weight_format} style", recipe, None, tensors, HEAD_PREFIXES)


def _classifier(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of the linear layers."""
    return [name for name in state_dict if name.startswith(("classifier.", "fc."))]
