"""Find copies of REFER's images under other ids, by image content."""

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

_LARGE_BYTES = 32 << 20  # larger files are decoded one at a time


@dataclass(frozen=True)
class Duplicate:
    """An image in a list that is a copy of a held-out image.

    Attributes:
        image: its id in the list, or its name.
        refer_image_id: COCO id of the held-out image.
        splits: held-out splits that contain that image.
        hamming_distance: number of the 143 hash bits that differ.
        correlation: of the thumbnails, 1 for identical up to brightness and contrast.
        mirrored: whether one is the other flipped left to right.
    """

    image: int | str
    refer_image_id: int
    splits: list[str]
    hamming_distance: int
    correlation: float
    mirrored: bool


@dataclass(frozen=True)
class ContentResult:
    """Result of `audit_content`.

    Attributes:
        compared: number of images of the list that were compared. Images already held out by id are skipped.
        missing: images of the list that have no file.
        unreadable: images of the list whose file is damaged.
        refer_compared: number of held-out images that were compared.
        refer_missing: held-out images that have no file.
        refer_unreadable: held-out images whose file is damaged.
        copies: copies that were found, in the order of the list.
        reasons: why the first image could not be compared, for each nonempty list above, by its attribute name.
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
        """The result as a JSON object; each copy has its distance under the name of 0.1 too."""
        whole = asdict(self)
        for copy in whole["copies"]:
            copy["bits"] = copy["hamming_distance"]  # its name in 0.1
        return whole

    def notes(self) -> list[str]:
        """One line for each kind of image that could not be compared."""
        lines = []
        for name, text in (
            ("missing", "images of the list have no file"),
            ("unreadable", "images of the list cannot be read"),
            ("refer_missing", "held-out images have no file, so their copies cannot be found"),
            ("refer_unreadable", "held-out images cannot be read, so their copies cannot be found"),
        ):
            if labels := getattr(self, name):
                lines.append(f"{len(labels)} {text}, first: {labels[0]} ({self.reasons[name]})")
        return lines


def audit_content(
    instances: str | Path,
    refer_root: str | Path,
    images: str | Path,
    refer_images: str | Path | None = None,
    exclude: Sequence[str] = (),
) -> ContentResult:
    """Look for copies of held-out images among the images of a list whose ids are not held out.

    Args:
        instances: the list, in any of the forms of `refdet.splits.image_list`.
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        images: folder or zip with the images of the list.
        refer_images: folder or zip with the held-out images, None if they are in ``images``.
        exclude: splits to look for, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...". Empty
            looks for all but train of every dataset found.

    Returns:
        The copies, and which images could not be compared.

    Raises:
        InputError: an invalid list or folder, or no image can be compared.
        refer.ReferError: invalid REFER data.
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
            f"{refer_images or images}: none of the {len(ids)} held-out images can be read; "
            "give the folder that has them with `refer_images`"
        )
    # Locate all records, as training does: which file a name refers to can depend on the others.
    own_source.locate([record for of_entry in records for record in of_entry])
    own = _compared(own_source, wanted, "images of the list")
    if wanted and not own.labels:
        raise InputError(
            f"`images` {images}: none of the {len(wanted)} images in {instances} can be read "
            f"(first: {[*own.missing, *own.unreadable][0][1]}); give the folder that has them"
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
    """Thumbnails of images; an image with an EXIF orientation has two.

    Attributes:
        labels: labels of the images that could be read.
        rows: index into ``labels`` of each thumbnail.
        pixels: (N, 32, 32) uint8 thumbnails, N = len(rows).
        missing: labels of the images without a file, each with the reason.
        unreadable: labels of the images with a damaged file, each with the reason.
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
        except RuntimeFailure:  # the whole zip became unreadable
            raise
        except Exception as error:  # decoders can raise anything on a damaged file
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
    """Records of an entry's images, looked up as `CocoIndex` does for an instances file, else by every name.

    Height and width are 0 where the list does not give them.
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
        # a URL is another address of an image that has a file name
        files = [name for name in names if "://" not in name] or names
        return [ImageRecord(-1, name, 0, 0) for name in files]
    # an image with only an unconfirmed id is not compared, so it stays unproven
    return [ImageRecord(-1 if image.unknown else min(image.numbers, default=-1), "", 0, 0)]


def _open_refer_images(path: str | Path) -> ImageSource:
    try:
        return ImageSource.open(path)
    except InputError as error:
        raise InputError(str(error).replace("`images`", "`refer_images`", 1)) from None
