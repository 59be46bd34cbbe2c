"""Verify a store by its checksums and the consistency of its parts. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refdet.errors import InputError
from refdet.files.progress import progress
from refdet.files.short_text import format_count
from refdet.store import CORRUPTION_ERRORS, Store
from refdet.store import open as open_store
from refdet.store.crc import crc32
from refdet.store.schema import CHECKSUMS, MAPS, attributes_checksum, check_starts, image_checksum
from refer.masks import rle_pixels

_TOLERANCE = 1.0  # pixels by which scaled boxes in the reference's inclusive convention may exceed the image
_MAP_STARTS = [f"maps/{name}_start" for name in MAPS]  # checked when a store is opened
_NO_CHECKSUMS = "no checksums (an older store); only the consistency of its parts was checked, not every byte"


@dataclass(frozen=True)
class Problem:
    """A damaged part of a store.

    Attributes:
        image_id: the image, None if the part does not belong to a single image.
        part: name of the dataset or attribute.
        what: the problem.
    """

    image_id: int | None
    part: str
    what: str

    def __str__(self) -> str:
        where = "" if self.image_id is None else f"image {self.image_id}: "
        return f"{where}{self.part}: {self.what}"


@dataclass
class Verification:
    """Result of `verify`.

    Attributes:
        path: the store.
        images: number of images that were checked.
        regions: number of regions that were checked.
        problems: damaged parts.
        unchecked: parts that could not be checked.
    """

    path: str
    images: int = 0
    regions: int = 0
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def damaged_images(self) -> list[int]:
        """Ids of the images with problems, in file order."""
        return list(dict.fromkeys(p.image_id for p in self.problems if p.image_id is not None))

    def to_json(self) -> dict[str, Any]:
        """JSON object as printed by `refdet inspect --verify --json`."""
        return {
            "kind": "store",
            "path": self.path,
            "ok": not self.problems,
            "images": self.images,
            "regions": self.regions,
            "unchecked": self.unchecked,
            "damaged_images": self.damaged_images,
            "problems": [{"image_id": p.image_id, "part": p.part, "what": p.what} for p in self.problems],
        }


def verify(path: Path) -> Verification:
    """Read a whole store and check it against its checksums and for consistency.

    Args:
        path: the store.

    Returns:
        The result; if the store cannot be opened, with one problem, for the whole file.
    """
    result = Verification(str(path))
    try:
        store = open_store(path, again=True)
    except InputError as error:
        result.problems.append(Problem(None, "file", str(error).removeprefix(f"{path}: ")))
        return result
    with store:
        result.images, result.regions = len(store), store.regions
        checksums = _read_checksums(store, result)
        categories = np.array([category["id"] for category in store.classes], np.int64)
        scores_in_unit_range = "boxes_sha256" not in store.options  # boxes from a file may have any scores
        for i in progress(range(len(store)), "verify", "image", leave=False):
            _check_image(store, i, checksums, categories, scores_in_unit_range, result)
    return result


def _read_checksums(store: Store, result: Verification) -> dict[str, np.ndarray]:
    """Read the checksums of a store, and add the problems of the table and the attributes to the result.

    Args:
        store: the store.
        result: gets the problems, and what has no checksums.

    Returns:
        Dataset or "images" -> (I,) uint32 checksum of each image; empty if the store has no usable checksums.
    """
    try:
        if CHECKSUMS not in store.file:
            result.unchecked.append(_NO_CHECKSUMS)
            return {}
        table = store.file[CHECKSUMS]
        names, values = json.loads(table.attrs["columns"]), table[:]
        if values.dtype != np.uint32 or values.shape != (len(store), len(names)):
            raise ValueError(f"{values.dtype} of shape {values.shape} instead of uint32 of {(len(store), len(names))}")
        if int(table.attrs["attributes"]) != attributes_checksum(store.file.attrs):
            result.problems.append(Problem(None, "attributes", "checksum mismatch"))
        result.problems += [
            Problem(None, name, "missing") for name in names if name != "images" and name not in store.data
        ]
        unlisted = [
            name for name in store.data if not name.startswith("images/") and name not in [*names, *_MAP_STARTS]
        ]
        result.unchecked += [f"{name} has no checksums" for name in unlisted]
        return {name: values[:, k] for k, name in enumerate(names) if name == "images" or name in store.data}
    except CORRUPTION_ERRORS as error:
        result.problems.append(Problem(None, CHECKSUMS, f"damaged: {error}"))
        return {}


def _check_image(
    store: Store,
    i: int,
    checksums: dict[str, np.ndarray],
    categories: np.ndarray,
    scores_in_unit_range: bool,
    result: Verification,
) -> None:
    """Check the image at a position in the file, and add its problems to the result."""
    image_id, rows = int(store.image_ids[i]), range(*store.region_start[i : i + 2].tolist())
    file_name, error = str(store.file_names[i]), str(store.image_errors[i])
    size = (int(store.heights[i]), int(store.widths[i]))
    problems = []
    if "images" in checksums:
        row_checksum = image_checksum(image_id, *size, rows.start, rows.stop, file_name, error)
        if row_checksum != checksums["images"][i]:
            problems.append(("images", "checksum mismatch"))
    if error and len(rows):
        problems.append(("images/error", "not empty, although the image has regions"))
    columns: dict[str, np.ndarray] = {}
    for name in store.data:
        if name.startswith("images/") or name in _MAP_STARTS:
            continue
        try:
            columns[name] = _read_column(store, name, i, rows)
        except CORRUPTION_ERRORS as exception:
            problems.append((name, f"cannot be read: {exception}"))
            continue
        if name in checksums and crc32(np.ascontiguousarray(columns[name]).data) != checksums[name][i]:
            problems.append((name, "checksum mismatch"))
    problems += _inconsistencies(columns, size, categories, scores_in_unit_range)
    result.problems += [Problem(image_id, part, what) for part, what in problems]


def _read_column(store: Store, name: str, i: int, rows: range) -> np.ndarray:
    """Read the rows of a dataset that belong to the image at a position in the file, whose regions have ``rows``."""
    data = store.data[name]
    first, last = rows.start, rows.stop
    if name == "regions/mask_start" and len(rows):
        first, last = rows.start + 1, rows.stop + 1  # the ends of the image's masks, which its checksum covers
    elif name == "regions/mask_counts" and len(rows):
        starts = store.data["regions/mask_start"][rows.start : rows.stop + 1]
        first, last = int(starts[0]), int(starts[-1])
        check_starts("regions/mask_start", starts - first, last - first)
    elif f"{name}_start" in _MAP_STARTS:
        first, last = store.data[f"{name}_start"][i : i + 2].tolist()
    elif name.startswith("maps/"):  # the shape of the map or im_info, with a row for each image
        first, last = i, i + 1
    if not 0 <= first <= last <= len(data):
        raise ValueError(f"its rows {first} to {last} are outside the dataset of {len(data)}")
    values: np.ndarray = data[first:last]
    return values


def _inconsistencies(
    columns: Mapping[str, np.ndarray], size: tuple[int, int], categories: np.ndarray, scores_in_unit_range: bool
) -> Iterator[tuple[str, str]]:
    """Iterate over the inconsistencies of an image.

    Args:
        columns: dataset -> the rows of the image, of the datasets that could be read.
        size: height and width of the image in pixels.
        categories: category ids of the detector.
        scores_in_unit_range: whether scores must be 0..1.

    Yields:
        (part, problem).
    """
    height, width = size
    if (boxes := columns.get("regions/box")) is not None:
        limit = np.array([width, height], np.float64) + _TOLERANCE
        low, high = boxes[:, :2], boxes[:, 2:]
        if not ((low >= -_TOLERANCE) & (low <= high) & (high <= limit)).all():
            yield "regions/box", f"a box is outside the image of {width}x{height} or inverted"
    if (scores := columns.get("regions/score")) is not None:
        if not np.isfinite(scores).all():
            yield "regions/score", "a score is not finite"
        elif scores_in_unit_range and not ((scores >= 0) & (scores <= 1)).all():
            yield "regions/score", "a score is outside 0 to 1"
    category_ids = columns.get("regions/category_id")
    if category_ids is not None and len(categories) and not np.isin(category_ids, categories).all():
        yield "regions/category_id", "a category is not in the file's classes"
    mask_ends, counts = columns.get("regions/mask_start"), columns.get("regions/mask_counts")
    if mask_ends is not None and counts is not None and len(mask_ends):
        first = mask_ends[-1] - len(counts)  # offset in the dataset of the image's first byte
        masks = np.split(counts, mask_ends[:-1] - first)
        if any(rle_pixels(mask.tobytes()) != height * width for mask in masks):
            yield "regions/mask_counts", f"a mask does not cover the image of {width}x{height}"
    for name, values in columns.items():
        if values.dtype.kind == "f" and name.startswith(("features/", "maps/")) and not np.isfinite(values).all():
            yield name, "a value is not finite"
        shape = columns.get(f"{name}_shape")
        if shape is not None and np.prod(shape, dtype=np.int64) != len(values):
            yield name, f"{format_count(len(values), 'value')} for a map of shape {shape[0].tolist()}"
