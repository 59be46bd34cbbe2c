"""`DetectionOptions`: thresholds and limits of the detections of an image."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

from refdet.errors import ArgumentError

PRECISIONS = ("float32", "tf32", "bfloat16")
"""Arithmetic of the network. float32 is IEEE float32 on a GPU too; tf32 has 10 bits of mantissa in products."""


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """Thresholds and limits of the detections of an image.

    Attributes:
        score_threshold: lowest class probability of a detection, 0..1.
        nms_threshold: IoU above which the lower-scoring of two detections of a class is removed, 0..1.
        max_regions: detections to keep per image, over all classes; 1 or more.
        lower_threshold_if_empty: lower the score threshold of an image without detections by 0.1 until it has one.

    Raises:
        ArgumentError: a value is out of range, NaN, or of the wrong type.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.3
    max_regions: int = 100
    lower_threshold_if_empty: bool = False

    def __post_init__(self) -> None:
        # stored as Python's own numbers, as NumPy's cannot be written as JSON
        for name in ("score_threshold", "nms_threshold"):
            value = getattr(self, name)
            if not _is_number(value, Real) or not 0 <= value <= 1:  # `not 0 <= value <= 1` is also true for NaN
                raise ArgumentError(name, f"must be a number from 0 to 1, not {value!r}")
            object.__setattr__(self, name, float(value))
        if not _is_number(self.max_regions, Integral):
            raise ArgumentError("max_regions", f"must be a whole number, not {self.max_regions!r}")
        object.__setattr__(self, "max_regions", int(self.max_regions))
        if self.max_regions < 1:
            raise ArgumentError("max_regions", f"must be 1 or more, not {self.max_regions}")
        if self.lower_threshold_if_empty not in (True, False):
            raise ArgumentError("lower_threshold_if_empty", f"must be a bool, not {self.lower_threshold_if_empty!r}")
        object.__setattr__(self, "lower_threshold_if_empty", bool(self.lower_threshold_if_empty))


def _is_number(value: object, kind: type) -> bool:
    """Whether a value is a number of a kind, and not a bool, which Python counts among the integers."""
    return isinstance(value, kind) and not isinstance(value, bool)
