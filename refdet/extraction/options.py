"""`ExtractOptions`: what an extraction computes and writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from refdet.errors import ArgumentError
from refdet.structures.detection_options import PRECISIONS, DetectionOptions

CHOICES = {
    "regions": ("detections", "annotations", "boxes"),
    "dtype": ("float32", "float16"),
    "precision": PRECISIONS,
    "masks": ("annotated", "predicted"),
    "compression": ("none", "gzip", "lzf"),
    "exif": ("ignore", "apply"),
}


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(DetectionOptions):
    """What an extraction computes and writes. The inherited thresholds apply to detections only.

    Attributes:
        regions: "detections", "annotations" (the annotated objects of the images) or "boxes" (from a file).
        features: names of the features to write, from `refdet.detector.feature_names`.
        dtype: type of the features in the store, "float32" or "float16".
        precision: arithmetic of the network, "float32", "tf32" or "bfloat16".
        masks: masks of annotations and boxes: their own ("annotated") or those of the detector ("predicted").
        compression: of features and maps in the store: "none", "gzip" or "lzf".
        exif: "ignore" or "apply" the EXIF orientation of the images.
        crowd_as_object: whether the image list was read with crowd annotations as objects.

    Raises:
        ArgumentError: a value is out of range, not one of the choices, or of the wrong type.
    """

    regions: str = "detections"
    features: tuple[str, ...] = ("pool5", "fc7")
    dtype: str = "float32"
    precision: str = "float32"
    masks: str = "annotated"
    compression: str = "none"
    exif: str = "ignore"
    crowd_as_object: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        features: Any = self.features  # a caller without a type checker may give anything
        is_list = isinstance(features, Iterable) and not isinstance(features, str)
        names = tuple(features) if is_list else ()
        if not is_list or not all(isinstance(name, str) for name in names):
            raise ArgumentError("features", f"a list of names is needed, not {features!r}")
        object.__setattr__(self, "features", tuple(dict.fromkeys(names)))  # without duplicates
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            # np.dtype("float32") == "float32", but could not be stored, so the type is checked too
            if not isinstance(value, str) or value not in choices:
                raise ArgumentError(name, f"must be one of {', '.join(choices)}, not {value!r}")
        if self.crowd_as_object not in (True, False):
            raise ArgumentError("crowd_as_object", f"must be a bool, not {self.crowd_as_object!r}")


def check_count(argument: str, value: Any) -> int | None:
    """Check a number of images or threads, and return it as a plain int; None if it is None.

    Args:
        argument: name of the argument.
        value: its value.

    Raises:
        ArgumentError: it is not an integer of 1 or more.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ArgumentError(argument, f"must be a whole number of 1 or more, not {value!r}")
    return int(value)
