"""Find copies of REFER's images under other ids, by image content."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.data.image_evidence import may_be_looked_up_by_id
from refdet.data.image_source import ImageSource, why_unreadable
from refdet.errors import InputError, RuntimeFailure
from refdet.files.progress import progress
from refdet.files.short_text import agree, format_count
from refdet.splits.benchmark import held_out_benchmarks
from refdet.splits.held_out import held_out
from refdet.splits.image_list import INSTANCES, ImageListFile
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
        compared: number of images of the list that were compared. Those that are held out by id are skipped.
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
        """The result as a JSON object, which also has the distance of each copy under its name in refdet 0.1."""
        result = asdict(self)
        for copy in result["copies"]:
            copy["bits"] = copy["hamming_distance"]
        return result

    def notes(self) -> list[str]:
        """One line for each kind of image that could not be compared."""
        lines = []
        for name, noun, where, effect in (
            ("missing", "image", " of the list", ""),
            ("unreadable", "image", " of the list", ""),
            ("refer_missing", "held-out image", "", ", so copies cannot be found"),
            ("refer_unreadable", "held-out image", "", ", so copies cannot be found"),
        ):
            if labels := getattr(self, name):
                count = len(labels)
                problem = "cannot be read" if name.endswith("unreadable") else f"{agree(count, 'has')} no file"
                images = f"{format_count(count, noun)}{where} {problem}{effect}"
                lines.append(f"{images}, first: {labels[0]} ({self.reasons[name]})")
        return lines


def audit_content(
    instances: str | Path,
    refer_root: str | Path,
    images: str | Path,
    refer_images: str | Path | None = None,
    exclude: Sequence[str] = (),
    benchmark: Sequence[str | Path] = (),
    argument: str = "images",
) -> ContentResult:
    """Look for copies of held-out images among the images of a list whose ids are not held out.

    Args:
        instances: the list, in any of the formats of `refdet.splits.image_list`.
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        images: folder or zip with the images of the list.
        refer_images: folder or zip with the held-out images, None if they are in ``images``.
        exclude: splits to look for, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...". Empty
            looks for all but train of every dataset found.
        benchmark: files with the images of other benchmarks, see `refdet.splits.benchmark`; their COCO images are
            held-out images too.
        argument: what error messages call ``images``.

    Returns:
        The copies, and which images could not be compared.

    Raises:
        InputError: an invalid list or folder, or no image can be compared.
        refer.ReferError: invalid REFER data.
    """
    splits = [*held_out(refer_root, exclude)[0], *held_out_benchmarks(benchmark)[0]]
    ids = sorted(frozenset().union(*(split.image_ids for split in splits)))
    source = ImageSource.open(images, argument=argument)
    refer_source = source if refer_images is None else ImageSource.open(refer_images, argument="refer_images")
    held_out_ids = frozenset(ids)
    image_list = read_image_list(instances, allow_unknown=True)
    records = [_records(image_list, index) for index in range(len(image_list.images))]
    to_compare = [
        (image.label, record)
        for image, entry_records in zip(image_list.images, records, strict=True)
        if held_out_ids.isdisjoint(image.coco_ids)
        for record in entry_records
    ]
    held_out_records = [ImageRecord(image_id, "", 0, 0) for image_id in ids]
    refer_source.locate(held_out_records)
    held_out_thumbnails = _compute_thumbnails(
        refer_source, [(record.id, record) for record in held_out_records], "held-out images"
    )
    if not held_out_thumbnails.labels:
        raise InputError(
            f"{refer_images or images}: none of {format_count(len(ids), 'held-out image')} can be read; "
            "give the folder that has them with `refer_images`"
        )
    # Locate all records, as training does: which file a name refers to can depend on the others.
    source.locate([record for entry_records in records for record in entry_records])
    candidates = _compute_thumbnails(source, to_compare, "images of the list")
    if to_compare and not candidates.labels:
        raise InputError(
            f"`{argument}` {images}: none of {format_count(len(to_compare), 'image')} in {instances} can be read "
            f"(first: {[*candidates.missing, *candidates.unreadable][0][1]}); give the folder that has them"
        )
    copies: dict[tuple[int, int, bool], Duplicate] = {}
    for match in matches(candidates.pixels, held_out_thumbnails.pixels):
        first, second = candidates.rows[match.first], held_out_thumbnails.rows[match.second]
        image_id = int(held_out_thumbnails.labels[second])
        names = [split.name for split in splits if image_id in split.image_ids]
        correlation = round(match.correlation, 4)
        copy = Duplicate(candidates.labels[first], image_id, names, match.hamming_distance, correlation, match.mirrored)
        key = first, second, match.mirrored
        # both images may have two thumbnails; the closest pair of them counts
        if key not in copies or copy.hamming_distance < copies[key].hamming_distance:
            copies[key] = copy
    not_compared = {
        "missing": candidates.missing,
        "unreadable": candidates.unreadable,
        "refer_missing": held_out_thumbnails.missing,
        "refer_unreadable": held_out_thumbnails.unreadable,
    }
    return ContentResult(
        compared=len(candidates.labels),
        missing=[label for label, _ in candidates.missing],
        unreadable=[label for label, _ in candidates.unreadable],
        refer_compared=len(held_out_thumbnails.labels),
        refer_missing=[label for label, _ in held_out_thumbnails.missing],
        refer_unreadable=[label for label, _ in held_out_thumbnails.unreadable],
        copies=list(copies.values()),
        reasons={name: failures[0][1] for name, failures in not_compared.items() if failures},
    )


@dataclass(frozen=True)
class _Thumbnails:
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


def _compute_thumbnails(source: ImageSource, images: Sequence[tuple[int | str, ImageRecord]], desc: str) -> _Thumbnails:
    """Decode images to thumbnails.

    Args:
        source: folder or zip of the images, which have been located in it.
        images: label and record of each image.
        desc: label of the progress bar.
    """
    large_image_lock = threading.Lock()

    def load(file: tuple[str, ImageRecord]) -> list[np.ndarray] | str:
        """The thumbnails of a file, or why it cannot be read."""
        name, record = file
        try:
            if source.size(name) <= _LARGE_BYTES:
                return thumbnails(source.data(name, record.height, record.width))
            with large_image_lock:
                return thumbnails(source.data(name, record.height, record.width))
        except RuntimeFailure:  # the whole zip became unreadable
            raise
        except Exception as error:  # decoders can raise anything on a damaged file
            source.raise_if_system_error(name, error)
            return f"{name}: {why_unreadable(error)}"

    missing, located_labels, files = [], [], []
    for label, record in images:
        name = source.find(record)
        if name is None:
            missing.append((label, source.why_missing(record)))
        else:
            located_labels.append(label)
            files.append((name, record))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = list(progress(pool.map(load, files), desc, "image", total=len(files)))
    labels: list[int | str] = []
    rows: list[int] = []
    pixels: list[np.ndarray] = []
    unreadable: list[tuple[int | str, str]] = []
    for label, result in zip(located_labels, loaded, strict=True):
        if isinstance(result, str):
            unreadable.append((label, result))
        else:
            rows += [len(labels)] * len(result)
            labels.append(label)
            pixels += result
    stacked = np.stack(pixels) if pixels else np.empty((0, SIDE, SIDE), np.uint8)
    return _Thumbnails(labels, rows, stacked, missing, unreadable)


def _records(image_list: ImageListFile, index: int) -> list[ImageRecord]:
    """Records by which to look up the images of an entry of a list.

    In an instances file that is one image, which is looked up as in training; in other lists it is one per file name of
    the entry. An id that must not be used to look up an image is -1; height and width that the list lacks are 0.
    """
    image = image_list.images[index]
    if image_list.format == INSTANCES:
        entry = json.loads(image_list.text[image.start : image.end])
        name = entry.get("file_name")
        id_ = -1 if image.id is None else image.id
        height, width = (entry.get(key) for key in ("height", "width"))
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            height = width = 0
        return [
            ImageRecord(id_, name if isinstance(name, str) else "", height, width, may_be_looked_up_by_id(entry, id_))
        ]
    names = image.evidence.addresses or ((image.name,) if image.name and not image.name.isdecimal() else ())
    if names:
        # a URL is just another address of an image with a file name
        files = [name for name in names if "://" not in name] or names
        return [ImageRecord(-1, name, 0, 0) for name in files]
    # an image with only an unconfirmed id is not compared, so it stays unproven
    return [ImageRecord(-1 if image.unknown else min(image.coco_ids, default=-1), "", 0, 0)]
