"""Copies of REFER's images under other ids, found by what they show."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refdet.data.coco import ImageRecord
from refdet.data.held_out import held_out
from refdet.data.image_lists import ListedImage
from refdet.data.images import ImageSource
from refdet.data.list_reading import read_image_list
from refdet.data.perceptual_hash import SIDE, matches, thumbnail
from refdet.errors import InputError, WorkError, is_of_the_machine


@dataclass(frozen=True)
class Copy:
    """An image of a list that shows the same as a held-out one.

    Attributes:
        image: its id in the list, or its name; refer_image_id: COCO's id of the other.
        splits: the held-out splits that have that one.
        bits, correlation, mirrored: see `refdet.data.perceptual_hash.Match`.
    """

    image: int | str
    refer_image_id: int
    splits: list[str]
    bits: int
    correlation: float
    mirrored: bool


@dataclass(frozen=True)
class ContentResult:
    """What `audit_content` compared and found.

    Attributes:
        compared: how many images of the list; held-out ones by id, which need no comparing, are not among them.
        missing: those that have no file; unreadable: those whose file is damaged.
        refer_compared, refer_missing, refer_unreadable: the same of the held-out images.
        copies: in the order of the list.
    """

    compared: int
    missing: list[int | str]
    unreadable: list[int | str]
    refer_compared: int
    refer_missing: list[int | str]
    refer_unreadable: list[int | str]
    copies: list[Copy]

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)

    def notes(self) -> list[str]:
        """What could not be compared, a line each."""
        lines = []
        for text, labels in (
            ("images of the list have no file", self.missing),
            ("images of the list cannot be read", self.unreadable),
            ("held-out images have no file, so their copies cannot be found", self.refer_missing),
            ("held-out images cannot be read, so their copies cannot be found", self.refer_unreadable),
        ):
            if labels:
                lines.append(f"--by-content: {len(labels)} {text}, the first is {labels[0]}")
        return lines


def audit_content(
    instances: str | Path,
    refer_root: str | Path,
    images: str | Path,
    refer_images: str | Path | None = None,
    exclude: Sequence[str] = (),
) -> ContentResult:
    """Look for copies of held-out images among the images of a list that are none by their ids.

    Arguments:
        instances: the list; see `refdet.data.image_lists`.
        refer_root, exclude: what is held out; see `held_out`.
        images: folder or zip with the images of the list.
        refer_images: the same with the held-out images; None if they are in ``images``.

    Raises:
        InputError: the list or a folder is bad, or no image at all can be compared.
        refer.ReferError: bad REFER data.
    """
    splits, _ = held_out(refer_root, exclude)
    ids = sorted(frozenset().union(*(split.image_ids for split in splits)))
    own_source = ImageSource.open(images)
    refer_source = own_source if refer_images is None else _open_refer_images(refer_images)
    everything = frozenset(ids)
    listed = [image for image in read_image_list(instances).images if everything.isdisjoint(image.numbers)]
    theirs = _thumbnails(refer_source, [(number, ImageRecord(number, "", 1, 1)) for number in ids], "held-out images")
    if not theirs.labels:
        raise InputError(
            f"{refer_images or images}: none of the {len(ids)} held-out images can be read there; "
            "give the folder that has them with --refer-images"
        )
    own = _thumbnails(own_source, [(image.label, _record(image)) for image in listed], "images of the list")
    if listed and not own.labels:
        raise InputError(f"--images {images}: none of the {len(listed)} images of {instances} can be read there")
    copies = []
    for match in matches(own.pixels, theirs.pixels):
        number = int(theirs.labels[match.second])
        names = [split.name for split in splits if number in split.image_ids]
        correlation = round(match.correlation, 4)
        copies.append(Copy(own.labels[match.first], number, names, match.bits, correlation, match.mirrored))
    return ContentResult(
        compared=len(own.labels),
        missing=own.missing,
        unreadable=own.unreadable,
        refer_compared=len(theirs.labels),
        refer_missing=theirs.missing,
        refer_unreadable=theirs.unreadable,
        copies=copies,
    )


@dataclass(frozen=True)
class _Thumbnails:
    labels: list[int | str]
    pixels: np.ndarray  # (N, 32, 32) uint8
    missing: list[int | str]
    unreadable: list[int | str]


def _thumbnails(source: ImageSource, wanted: Sequence[tuple[int | str, ImageRecord]], what: str) -> _Thumbnails:
    names = [(label, source.find(record)) for label, record in wanted]
    there = [(label, name) for label, name in names if name is not None]

    def make(item: tuple[int | str, str]) -> np.ndarray | None:
        try:
            return thumbnail(source.data(item[1]))
        except Exception as error:  # a damaged file can make a decoder fail in any way; it is counted and named
            if isinstance(error, WorkError):  # the whole folder or zip is gone
                raise
            if is_of_the_machine(error):
                raise WorkError(f"{item[1]}: cannot be read now ({error}); run it again") from error
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(tqdm(pool.map(make, there), total=len(there), desc=what, unit="image", disable=None))
    pixels = [thumb for thumb in made if thumb is not None]
    return _Thumbnails(
        labels=[label for (label, _), thumb in zip(there, made, strict=True) if thumb is not None],
        pixels=np.stack(pixels) if pixels else np.empty((0, SIDE, SIDE), np.uint8),
        missing=[label for label, name in names if name is None],
        unreadable=[label for (label, _), thumb in zip(there, made, strict=True) if thumb is None],
    )


def _record(image: ListedImage) -> ImageRecord:
    # -1 for an image that is not COCO's, so that it is sought by its own name alone
    return ImageRecord(min(image.numbers, default=-1), image.name, 1, 1)


def _open_refer_images(path: str | Path) -> ImageSource:
    try:
        return ImageSource.open(path)
    except InputError as error:
        raise InputError(str(error).replace("--images", "--refer-images", 1)) from None
