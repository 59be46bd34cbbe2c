"""`ExtractOptions`: what an extraction computes."""

from __future__ import annotations

from dataclasses import dataclass

from refdet.errors import InputError


@dataclass(frozen=True)
class ExtractOptions:
    """What is extracted; see the options of ``refdet extract-features``."""

    regions: str = "detections"
    features: tuple[str, ...] = ("pool5", "fc7")
    dtype: str = "float32"
    score_threshold: float = 0.05
    nms_threshold: float = 0.3
    max_regions: int = 100
    precision: str = "float32"
    at_least_one: bool = False
    masks: str = "annotated"  # of given boxes: theirs, or "predicted" by the detector for them
    compression: str = "none"
    exif: str = "ignore"  # or "apply": turn images upright as their EXIF orientation says
    crowd_as_object: bool = False  # the image list was read so

    def __post_init__(self) -> None:
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:  # NaN neither
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be a number from 0 to 1")
