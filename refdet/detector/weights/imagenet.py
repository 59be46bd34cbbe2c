"""ImageNet VGG-16 and MobileNet v1, as starting weights of the reference's detectors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refdet.config import recipe as recipes
from refdet.detector.checkpoint import HEAD_PREFIXES
from refdet.detector.weights.fitting import ConvertedWeights, Naming, fit
from refdet.detector.weights.reference import mobilenet_changes, mobilenet_parts, vgg_changes, vgg_parts
from refdet.errors import InputError

_VGG, _MOBILENET = "features.26.weight", "Conv2d_13.pointwise.0.weight"
_TORCHVISION = (  # changes of the reference's recipe
    "input.order=rgb",
    "input.mean=[123.675,116.28,103.53]",
    "input.std=[58.395,57.12,57.375]",
)


def is_network(given: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of one of these networks."""
    return _VGG in given or any(name.removeprefix("features.") == _MOBILENET for name in given)


def identify(given: Mapping[str, Tensor], style: str | None) -> ConvertedWeights:
    """Identify a VGG-16 or a MobileNet v1.

    Args:
        given: name -> tensor.
        style: "caffe" for inputs as the reference's, "torchvision" for those of torchvision; None to detect it.

    Raises:
        InputError: missing or unexpected tensors, or a style that does not show.
    """
    if _VGG in given:
        return _vgg(given, style)
    if style == "torchvision":
        raise InputError("`style='torchvision'`: torchvision has no MobileNet v1")
    prefix = "features." if f"features.{_MOBILENET}" in given else ""
    recipe = recipes.load("reference-mobilenet-v1").with_changes(mobilenet_changes(given, prefix))
    tensors = fit(recipe, 0, given, Naming(mobilenet_parts(prefix), {}), _classifier(given), untrained=HEAD_PREFIXES)
    return ConvertedWeights("an ImageNet MobileNet v1 in caffe style", recipe, None, tensors, HEAD_PREFIXES)


def _vgg(given: Mapping[str, Tensor], style: str | None) -> ConvertedWeights:
    caffe_numbers = "classifier.1.weight" in given  # of Caffe's layers, whose first one flattens
    style = style or ("caffe" if caffe_numbers else None)
    if style is None:
        raise InputError(
            "a VGG-16 of ImageNet, whose tensors do not show its input; `style='torchvision'` for torchvision's, "
            "`style='caffe'` for one converted from Caffe (BGR without division)"
        )
    recipe = recipes.load("reference-vgg16")
    changes = vgg_changes(given, "", fc6=int(caffe_numbers))
    recipe = recipe.with_changes(changes if style == "caffe" else [*_TORCHVISION, *changes])
    parts = vgg_parts("", fc6=int(caffe_numbers))
    own = tuple(parts.values())
    unused = [name for name in _classifier(given) if not name.startswith(own)]
    tensors = fit(recipe, 0, given, Naming(parts, {}), unused, untrained=HEAD_PREFIXES)
    return ConvertedWeights(f"an ImageNet VGG-16 in {style} style", recipe, None, tensors, HEAD_PREFIXES)


def _classifier(given: Mapping[str, Tensor]) -> list[str]:
    return [name for name in given if name.startswith(("classifier.", "fc."))]
