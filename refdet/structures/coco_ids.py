"""COCO image numbers in file names, paths and addresses."""

from __future__ import annotations

import re

# COCO writes an id with twelve digits: COCO_train2014_000000000009.jpg, 000000000009.jpg, and REFER's own
# COCO_train2014_000000000009_4.jpg. Its ids are below a million: twelve digits without six zeros are a date.
_TWELVE = re.compile(r"(?<![0-9])0{6}([0-9]{6})(?![0-9])")
_BARE = re.compile(r"(0{0,6}[0-9]{1,6})(?:\.[A-Za-z]+)?")
# Visual Genome's images lie in VG_100K and VG_100K_2 under numbers of its own.
_VISUAL_GENOME = re.compile(r"(?:^|[/\\])VG_100K(?:_2)?[/\\]")
_IMAGE_FILE = re.compile(r"\.(?:jpe?g|jfif|png|gif|bmp|webp|tiff?|p[pgbn]m)", re.IGNORECASE)

LARGEST = 999_999
"""COCO's ids have six digits at most."""


def numbers_in_name(name: str) -> frozenset[int]:
    """The numbers of twelve digits, six zeros first, anywhere in a path or address."""
    return frozenset(int(digits) for digits in _TWELVE.findall(name))


def bare_number(name: str) -> int | None:
    """The number that is all of a name but its suffix ("9.jpg" and "9": 9), unless it is Visual Genome's own.

    COCO's ids have six digits at most, so a longer number is None.
    """
    if is_visual_genome(name):
        return None
    match = _BARE.fullmatch(_last_part(name))
    return int(match[1]) if match else None


def is_visual_genome(name: str) -> bool:
    """Whether a path or address is of a file in Visual Genome's own folders."""
    return _VISUAL_GENOME.search(name) is not None


def is_image_file(name: str) -> bool:
    """Whether a path or address ends as an image file's does."""
    last = _last_part(name)
    return _IMAGE_FILE.fullmatch(last[max(last.rfind("."), 0) :]) is not None and len(last) < 300


def _last_part(name: str) -> str:
    return name.partition("?")[0].rstrip("/\\").replace("\\", "/").rpartition("/")[2]
