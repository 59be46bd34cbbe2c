"""COCO image ids in file names, paths and URLs."""

from __future__ import annotations

import re

# COCO pads ids to twelve digits: COCO_train2014_000000000009.jpg, 000000000009.jpg, and REFER's
# COCO_train2014_000000000009_4.jpg. Ids are below a million, so twelve digits without six leading zeros are
# something else, such as a timestamp.
_PADDED = re.compile(r"(?<![0-9])0{6}([0-9]{6})(?![0-9])")
_BARE = re.compile(r"(0{0,6}[0-9]{1,6})(?:\.[A-Za-z]+)?")
# Visual Genome's images are in VG_100K and VG_100K_2, with ids of their own.
_VISUAL_GENOME = re.compile(r"(?:^|[/\\])VG_100K(?:_2)?[/\\]")
# Folders of other datasets with ids of their own, as in LLaVA's lists: GQA's are Visual Genome's, Flickr30k's are
# Flickr's (a few have fewer than seven digits), saiapr_tc-12 is RefClef's. Their subfolders may hold COCO's images.
_OTHER_DATASET = re.compile(r"(?:^|[/\\])(?:gqa|(?:flickr30k|saiapr)(?![^/\\]*coco)[^/\\]*)(?=[/\\])", re.IGNORECASE)
_COCO_FOLDER = re.compile(r"[/\\](?:[^/\\]*coco[^/\\]*|(?:train|val|test)20[0-9]{2})[/\\]", re.IGNORECASE)
_MAX_NAME_LENGTH = 299  # file systems allow at most 255, so longer text is not a file name
_IMAGE_SUFFIX = re.compile(r"\.(?:jpe?g|jfif|png|gif|bmp|webp|tiff?|p[pgbn]m)", re.IGNORECASE)

MAX_ID = 999_999
"""Upper limit of COCO image ids, which have six digits."""


def numbers_in_name(name: str) -> frozenset[int]:
    """Zero-padded twelve-digit ids anywhere in a path or URL."""
    return frozenset(int(digits) for digits in _PADDED.findall(name))


def bare_number(name: str) -> int | None:
    """The id if a file name without its suffix is a number ("9.jpg" and "9": 9), else None.

    None also for images in folders of Visual Genome, GQA, Flickr30k and RefClef and for numbers above `MAX_ID`; leading
    zeros are allowed up to twelve digits.
    """
    if has_other_numbering(name):
        return None
    match = _BARE.fullmatch(_base_name(name))
    return int(match[1]) if match else None


def is_visual_genome(name: str) -> bool:
    """Whether a path or URL is in Visual Genome's image folders."""
    return _VISUAL_GENOME.search(name) is not None


def has_other_numbering(name: str) -> bool:
    """Whether a path or URL is in a folder of another dataset, with ids of its own: Visual Genome's or one like it."""
    if is_visual_genome(name):
        return True
    folder = _OTHER_DATASET.search(name)
    return folder is not None and not _COCO_FOLDER.search(name, folder.end())


def is_image_file(name: str) -> bool:
    """Whether a path or URL has the suffix of an image file."""
    name = _base_name(name)
    suffix = name[max(name.rfind("."), 0) :]
    return _IMAGE_SUFFIX.fullmatch(suffix) is not None and len(name) <= _MAX_NAME_LENGTH


def _base_name(name: str) -> str:
    """Last component of a path or URL, without a query."""
    return _path(name).replace("\\", "/").rpartition("/")[2]


def _path(name: str) -> str:
    """A path without final slashes, or a URL without them, a query and a fragment."""
    if "://" in name:
        name = name.partition("#")[0]
    return name.partition("?")[0].rstrip("/\\")
