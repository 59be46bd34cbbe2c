"""Whether a store is whole: its checksums, and that its parts fit together. No torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refdet.errors import InputError
from refdet.files.progress import progress
from refdet.store import CORRUPTION_ERRORS, Store
from refdet.store import open as open_store
from refdet.store.schema import CHECKSUMS, MAPS, attributes_checksum, check_starts, image_checksum
from refer.masks import rle_pixels

# The reference's arithmetic of inclusive boxes, scaled back, ends up to a pixel outside.
_OUTSIDE = 1.0
_STARTS = [f"maps/{name}_start" for name in MAPS]  # checked when a store is opened
_NO_CHECKSUMS = "has no checksums (an older store): only that its parts fit together was checked, not every byte"


@dataclass(frozen=True)
class Problem:
    """What is wrong with one part of a store; ``image_id`` is None where it is not one image's."""

    image_id: int | None
    part: str
    what: str

    def __str__(self) -> str:
        where = "" if self.image_id is None else f"image {self.image_id}: "
        return f"{where}{self.part}: {self.what}"


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        path: the store.
        images, regions: how many were looked at.
        problems: what is damaged.
        unchecked: what could not be checked.
    """

    path: str
    images: int = 0
    regions: int = 0
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def damaged_images(self) -> list[int]:
        """The ids of the images that a problem is about, in the order of the file."""
        return list(dict.fromkeys(p.image_id for p in self.problems if p.image_id is not None))

    def to_json(self) -> dict[str, Any]:
        """As `refdet inspect --verify --json` prints it."""
        return {
            "kind": "store", "path": self.path, "ok": not self.problems, "images": self.images,
            "regions": self.regions, "unchecked": self.unchecked, "damaged_images": self.damaged_images,
            "problems": [{"image_id": p.image_id, "part": p.part, "what": p.what} for p in self.problems],
        }  # fmt: skip


def verify(path: Path) -> Verification:
    """Read a whole store, an image at a time, and compare it with its checksums and with itself.

    What cannot be opened at all is one problem of the whole file.
    """
    found = Verification(str(path))
    try:
        store = open_store(path, again=True)
    except InputError as error:
        found.problems.append(Problem(None, "file", str(error).removeprefix(f"{path}: ")))
        return found
    with store:
        found.images, found.regions = len(store), store.regions
        checksums = _checksums(store, found)
        categories = np.array([one["id"] for one in store.classes], np.int64)
        rates = "boxes_sha256" not in store.options  # boxes that were given have the scores of whatever found them
        for i in progress(range(len(store)), "verify", "image", leave=False):
            _check_image(store, i, checksums, categories, rates, found)
    return found


def _checksums(store: Store, found: Verification) -> dict[str, np.ndarray]:
    """Column -> (I,) checksums; empty where there are none."""
    try:
        if CHECKSUMS not in store.file:
            found.unchecked.append(_NO_CHECKSUMS)
            return {}
        table = store.file[CHECKSUMS]
        names, values = json.loads(table.attrs["columns"]), table[:]
        if values.dtype != np.uint32 or values.shape != (len(store), len(names)):
            raise ValueError(f"is {values.dtype} {values.shape} for {len(store)} images and {len(names)} columns")
        if int(table.attrs["attributes"]) != attributes_checksum(store.file.attrs):
            found.problems.append(Problem(None, "attributes", "are not those that were written"))
        found.problems += [
            Problem(None, name, "is missing") for name in names if name != "images" and name not in store.data
        ]
        without = [name for name in store.data if not name.startswith("images/") and name not in [*names, *_STARTS]]
        found.unchecked += [f"{name} has no checksums" for name in without]
        return {name: values[:, k] for k, name in enumerate(names) if name == "images" or name in store.data}
    except CORRUPTION_ERRORS as error:
        found.problems.append(Problem(None, CHECKSUMS, f"damaged: {error}"))
        return {}


def _check_image(
    store: Store,
    i: int,
    checksums: dict[str, np.ndarray],
    categories: np.ndarray,
    rates: bool,
    found: Verification,
) -> None:
    image_id, rows = int(store.image_ids[i]), range(*store.region_start[i : i + 2].tolist())
    file_name, error = str(store.file_names[i]), str(store.image_errors[i])
    size = (int(store.heights[i]), int(store.widths[i]))
    wrong = []
    if "images" in checksums:
        row = image_checksum(image_id, *size, rows.start, rows.stop, file_name, error)
        if row != checksums["images"][i]:
            wrong.append(("images", "not what was written"))
    if error and len(rows):
        wrong.append(("images/error", "it has regions although it could not be read"))
    columns: dict[str, np.ndarray] = {}
    for name in store.data:
        if name.startswith("images/") or name in _STARTS:
            continue
        try:
            columns[name] = _slice(store, name, i, rows)
        except CORRUPTION_ERRORS as error_:
            wrong.append((name, f"cannot be read: {error_}"))
            continue
        if name in checksums and zlib.crc32(np.ascontiguousarray(columns[name]).data) != checksums[name][i]:
            wrong.append((name, "not what was written"))
    wrong += _inconsistencies(columns, size, categories, rates)
    found.problems += [Problem(image_id, part, what) for part, what in wrong]


def _slice(store: Store, name: str, i: int, rows: range) -> np.ndarray:
    """An image's part of a dataset."""
    data = store.data[name]
    first, last = rows.start, rows.stop
    if name == "regions/mask_start" and len(rows):
        first, last = rows.start + 1, rows.stop + 1  # where its masks end
    elif name == "regions/mask_counts" and len(rows):
        starts = store.data["regions/mask_start"][rows.start : rows.stop + 1]
        first, last = int(starts[0]), int(starts[-1])
        check_starts("its masks", starts - first, last - first)
    elif f"{name}_start" in _STARTS:
        first, last = store.data[f"{name}_start"][i : i + 2].tolist()
    elif name.startswith("maps/"):
        first, last = i, i + 1
    if not 0 <= first <= last <= len(data):
        raise ValueError("its place lies outside of the dataset")
    values: np.ndarray = data[first:last]
    return values


def _inconsistencies(
    columns: Mapping[str, np.ndarray], size: tuple[int, int], categories: np.ndarray, rates: bool
) -> Iterator[tuple[str, str]]:
    """What no sound image of a store has, as (part, what)."""
    height, width = size
    if (boxes := columns.get("regions/box")) is not None:
        limit = np.array([width, height], np.float64) + _OUTSIDE
        low, high = boxes[:, :2], boxes[:, 2:]
        if not ((low >= -_OUTSIDE) & (low <= high) & (high <= limit)).all():
            yield "regions/box", f"a box is not inside the image of {width}x{height}, or is turned over"
    if (scores := columns.get("regions/score")) is not None:
        if not np.isfinite(scores).all():
            yield "regions/score", "a score is not finite"
        elif rates and not ((scores >= 0) & (scores <= 1)).all():
            yield "regions/score", "a score is not in 0 to 1"
    known = columns.get("regions/category_id")
    if known is not None and len(categories) and not np.isin(known, categories).all():
        yield "regions/category_id", "a category is none of the file's classes"
    ends, counts = columns.get("regions/mask_start"), columns.get("regions/mask_counts")
    if ends is not None and counts is not None and len(ends):
        cuts = (ends - (ends[-1] - len(counts)))[:-1]
        if any(rle_pixels(part.tobytes()) != height * width for part in np.split(counts, cuts)):
            yield "regions/mask_counts", f"a mask does not cover the image of {width}x{height}"
    for name, values in columns.items():
        if values.dtype.kind == "f" and name.startswith(("features/", "maps/")) and not np.isfinite(values).all():
            yield name, "a value is not finite"
        shape = columns.get(f"{name}_shape")
        if shape is not None and np.prod(shape, dtype=np.int64) != len(values):
            yield name, f"{len(values)} values do not make a map of {shape[0].tolist()}"
