"""Copies of REFER's images under other ids, found by what they show."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.data.image_evidence import goes_by_id
from refdet.data.image_source import ImageSource, why_unreadable
from refdet.errors import InputError, RuntimeFailure
from refdet.files.progress import progress
from refdet.splits.held_out import held_out
from refdet.splits.image_list import INSTANCES, ImageList
from refdet.splits.list_reading import read_image_list
from refdet.splits.perceptual_hash import SIDE, matches, thumbnails

_LARGE_BYTES = 32 << 20  # of a file; such are looked at one at a time


@dataclass(frozen=True)
class Duplicate:
    """An image of a list that shows the same as a held-out one.

    Attributes:
        image: its id in the list, or its name; refer_image_id: COCO's id of the other.
        splits: the held-out splits that have that one.
        hamming_distance, correlation, mirrored: see `refdet.splits.perceptual_hash.Match`.
    """

    image: int | str
    refer_image_id: int
    splits: list[str]
    hamming_distance: int
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
        reasons: why the first of each of the four lists of images that were not compared could not be, by its name.
    """

    compared: int
    missing: list[int | str]
    unreadable: list[int | str]
    refer_compared: int
    refer_missing: list[int | str]
    refer_unreadable: list[int | str]
    copies: list[Duplicate]
    reasons: dict[str, str] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)

    def notes(self) -> list[str]:
        """What could not be compared, a line each."""
        lines = []
        for name, text in (
            ("missing", "images of the list have no file"),
            ("unreadable", "images of the list cannot be read"),
            ("refer_missing", "held-out images have no file, so their copies cannot be found"),
            ("refer_unreadable", "held-out images cannot be read, so their copies cannot be found"),
        ):
            if labels := getattr(self, name):
                lines.append(
                    f"--find-duplicates: {len(labels)} {text}, the first is {labels[0]} ({self.reasons[name]})"
                )
        return lines


def audit_content(
    instances: str | Path,
    refer_root: str | Path,
    images: str | Path,
    refer_images: str | Path | None = None,
    exclude: Sequence[str] = (),
) -> ContentResult:
    """Look for copies of held-out images among the images of a list that are none by their ids.

    Args:
        instances: the list; see `refdet.splits.image_list`.
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
    found = read_image_list(instances)
    records = [_records(found, number) for number in range(len(found.images))]
    wanted = [
        (image.label, record)
        for image, of_entry in zip(found.images, records, strict=True)
        if everything.isdisjoint(image.numbers)
        for record in of_entry
    ]
    held = [ImageRecord(number, "", 0, 0) for number in ids]
    refer_source.locate(held)
    theirs = _compared(refer_source, [(record.id, record) for record in held], "held-out images")
    if not theirs.labels:
        raise InputError(
            f"{refer_images or images}: none of the {len(ids)} held-out images can be read there; "
            "give the folder that has them with --refer-images"
        )
    # all of them, as training does: which file one means can depend on the others
    own_source.locate([record for of_entry in records for record in of_entry])
    own = _compared(own_source, wanted, "images of the list")
    if wanted and not own.labels:
        raise InputError(
            f"--images {images}: none of the {len(wanted)} images of {instances} can be read there "
            f"(the first: {[*own.missing, *own.unreadable][0][1]})"
        )
    best: dict[tuple[int, int, bool], Duplicate] = {}  # an image may have two thumbnails
    for match in matches(own.pixels, theirs.pixels):
        first, second = own.rows[match.first], theirs.rows[match.second]
        number = int(theirs.labels[second])
        names = [split.name for split in splits if number in split.image_ids]
        correlation = round(match.correlation, 4)
        copy = Duplicate(own.labels[first], number, names, match.hamming_distance, correlation, match.mirrored)
        key = first, second, match.mirrored
        best[key] = min(best.get(key, copy), copy, key=lambda one: one.hamming_distance)
    lists = {
        "missing": own.missing,
        "unreadable": own.unreadable,
        "refer_missing": theirs.missing,
        "refer_unreadable": theirs.unreadable,
    }
    return ContentResult(
        compared=len(own.labels),
        missing=[label for label, _ in own.missing],
        unreadable=[label for label, _ in own.unreadable],
        refer_compared=len(theirs.labels),
        refer_missing=[label for label, _ in theirs.missing],
        refer_unreadable=[label for label, _ in theirs.unreadable],
        copies=list(best.values()),
        reasons={name: labels[0][1] for name, labels in lists.items() if labels},
    )


@dataclass(frozen=True)
class _Compared:
    """Images as thumbnails: of some there are two, see `thumbnails`.

    Attributes:
        labels: of the images that could be read; rows: the image, a row of labels, of each thumbnail.
        pixels: (N, 32, 32) uint8, the thumbnails.
        missing, unreadable: the labels of the others, each with why.
    """

    labels: list[int | str]
    rows: list[int]
    pixels: np.ndarray
    missing: list[tuple[int | str, str]]
    unreadable: list[tuple[int | str, str]]


def _compared(source: ImageSource, wanted: Sequence[tuple[int | str, ImageRecord]], what: str) -> _Compared:
    one_large = threading.Lock()

    def make(item: tuple[int | str, ImageRecord]) -> list[np.ndarray] | str:
        name = source.find(item[1])
        if name is None:
            return ""
        height, width = item[1].height, item[1].width
        try:
            if source.size(name) <= _LARGE_BYTES:
                return thumbnails(source.data(name, height, width))
            with one_large:
                return thumbnails(source.data(name, height, width))
        except RuntimeFailure:  # the whole zip is gone
            raise
        except Exception as error:  # a damaged file can make a decoder fail in any way; it is counted and named
            source.refuse_unread(name, error)
            return f"{name}: {why_unreadable(error)}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(progress(pool.map(make, wanted), what, "image", total=len(wanted)))
    found = _Compared([], [], np.empty((0, SIDE, SIDE), np.uint8), [], [])
    pixels: list[np.ndarray] = []
    for (label, record), result in zip(wanted, made, strict=True):
        if result == "":
            found.missing.append((label, source.why_missing(record)))
        elif isinstance(result, str):
            found.unreadable.append((label, result))
        else:
            found.rows.extend([len(found.labels)] * len(result))
            found.labels.append(label)
            pixels.extend(result)
    return replace(found, pixels=np.stack(pixels)) if pixels else found


def _records(found: ImageList, number: int) -> list[ImageRecord]:
    """The images of an entry as training looks them up: of an instances file as `CocoIndex` does, else by every name.

    Their size is 0x0 where the list does not give one.
    """
    image = found.images[number]
    if found.form == INSTANCES:
        entry = json.loads(found.text[image.start : image.end])
        name = entry.get("file_name")
        id_ = -1 if image.id is None else image.id
        height, width = (entry.get(key) for key in ("height", "width"))
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            height = width = 0
        return [ImageRecord(id_, name if isinstance(name, str) else "", height, width, goes_by_id(entry, id_))]
    names = image.evidence.addresses or ((image.name,) if image.name and not image.name.isdecimal() else ())
    if names:
        # urls are other addresses of an image that has a file name
        files = [name for name in names if "://" not in name] or names
        return [ImageRecord(-1, name, 0, 0) for name in files]
    # what is known by nothing but an id that is not confirmed is not compared, so it stays unproven
    return [ImageRecord(-1 if image.unknown else min(image.numbers, default=-1), "", 0, 0)]


def _open_refer_images(path: str | Path) -> ImageSource:
    try:
        return ImageSource.open(path)
    except InputError as error:
        raise InputError(str(error).replace("--images", "--refer-images", 1)) from None
