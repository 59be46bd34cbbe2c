"""The HDF5 file of regions, schema ``refdet-features/1``: its reader and its writer. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np

from refdet.atomic import atomic_path
from refdet.errors import InputError
from refdet.hdf5_space import new_file
from refdet.regions import Regions

SCHEMA = "refdet-features/1"

_ATTRIBUTES = ("classes", "recipe", "provenance", "options", "complete")
_IMAGE_COLUMNS = ("id", "file_name", "height", "width", "region_start", "error")


@dataclass(frozen=True)
class Header:
    """What a store says about itself.

    Attributes:
        classes: the categories its detector knows, ``[{"id": int, "name": str}]``.
        recipe: the detector's recipe as text.
        provenance: `refdet.provenance.Provenance` as JSON.
        options: how the regions were computed; JSON.
    """

    classes: list[dict[str, Any]]
    recipe: str
    provenance: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which optional columns a store has.

    Attributes:
        features: feature name -> width.
        dtype: "float32" or "float16", of all features.
        masks, ann_ids: whether there are masks and annotation ids.
    """

    features: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    masks: bool = False
    ann_ids: bool = False


class ImageRow(NamedTuple):
    """One image of a store to be written: what must be known of it before the regions are."""

    id: int
    file_name: str
    height: int
    width: int
    error: str
    regions: int
    mask_bytes: int


class StoreWriter:
    """Puts regions into a new store, images in any order; made by `create`.

    All datasets are contiguous and have their final size from the start, so an image's rows go straight to
    their place and memory holds one image at a time.
    """

    def __init__(self, file: h5py.File, header: Header, columns: Columns, images: Sequence[ImageRow]) -> None:
        self._file = file
        self._columns = columns
        self._at = {image.id: i for i, image in enumerate(images)}
        if len(self._at) != len(images):
            raise ValueError("an image is in the list twice")
        self._region_start = _starts([image.regions for image in images])
        self._mask_start = _starts([image.mask_bytes for image in images])
        self._missing = set(self._at)
        file.attrs["schema"] = SCHEMA
        file.attrs["classes"] = json.dumps(header.classes)
        file.attrs["recipe"] = header.recipe
        file.attrs["provenance"] = json.dumps(header.provenance)
        file.attrs["options"] = json.dumps(header.options)
        file.attrs["complete"] = False
        self._describe_images(images)
        n = int(self._region_start[-1])
        self._new("regions/box", (n, 4), np.float32)
        self._new("regions/score", (n,), np.float32)
        self._new("regions/category_id", (n,), np.int64)
        if columns.ann_ids:
            self._new("regions/ann_id", (n,), np.int64)
        if columns.masks:
            self._new("regions/mask_counts", (int(self._mask_start[-1]),), np.uint8)
            self._new("regions/mask_start", (n + 1,), np.int64)[0] = 0
        file.create_group("features")
        for name, width in columns.features.items():
            self._new(f"features/{name}", (n, width), np.dtype(columns.dtype))

    def _describe_images(self, images: Sequence[ImageRow]) -> None:
        text = h5py.string_dtype("utf-8")
        for name, dtype in (("id", np.int64), ("height", np.int32), ("width", np.int32)):
            values = np.array([getattr(image, name) for image in images], dtype)
            self._file.create_dataset(f"images/{name}", data=values, track_times=False)
        for name in ("file_name", "error"):
            # Without its own, h5py makes of an empty list an array of floats.
            strings = np.array([getattr(image, name) for image in images], dtype=object)
            self._file.create_dataset(f"images/{name}", data=strings, dtype=text, track_times=False)
        self._file.create_dataset("images/region_start", data=self._region_start, track_times=False)

    def _new(self, name: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
        return self._file.create_dataset(name, shape, dtype, track_times=False)

    def put(self, regions: Regions) -> None:
        """Write one image's regions. ValueError where they are not what was announced in ``images``."""
        i = self._at[regions.image_id]
        self._missing.remove(regions.image_id)
        first, last = int(self._region_start[i]), int(self._region_start[i + 1])
        if len(regions) != last - first:
            raise ValueError(f"image {regions.image_id}: {len(regions)} regions, {last - first} were announced")
        if first == last:
            return
        file = self._file
        file["regions/box"][first:last] = regions.boxes
        file["regions/score"][first:last] = regions.scores
        file["regions/category_id"][first:last] = regions.category_ids
        if self._columns.ann_ids:
            if regions.ann_ids is None:
                raise ValueError(f"image {regions.image_id}: its regions have no annotation ids")
            file["regions/ann_id"][first:last] = regions.ann_ids
        if self._columns.masks:
            if regions.masks is None:
                raise ValueError(f"image {regions.image_id}: its regions have no masks")
            start, stop = int(self._mask_start[i]), int(self._mask_start[i + 1])
            file["regions/mask_counts"][start:stop] = np.frombuffer(b"".join(regions.masks), np.uint8)
            file["regions/mask_start"][first + 1 : last + 1] = start + np.cumsum([len(m) for m in regions.masks])
        for name in self._columns.features:
            file[f"features/{name}"][first:last] = regions.features[name]

    def finish(self) -> None:
        """Mark the store complete. ValueError where an image was never put."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} images were never written, the first {min(self._missing)}")
        self._file.attrs["complete"] = True


@contextmanager
def create(
    path: Path, header: Header, columns: Columns, images: Sequence[ImageRow], space: int = 0
) -> Iterator[StoreWriter]:
    """Write a store at ``path``: there is nothing under that name until all of it is there.

    Arguments:
        images: all images in the order they get in the file.
        space: bytes that are set aside on the disk before the first is written.
    """
    with atomic_path(path) as temporary, new_file(temporary, space) as file:
        writer = StoreWriter(file, header, columns, images)
        yield writer
        writer.finish()


class Store:
    """A complete file of regions, read as needed; made by `open`.

    Attributes:
        path: the file.
        image_ids: (I,) int64, in the order of the file.
        classes, recipe, provenance, options: see `Header`.
        complete: True.
        feature_names: the features it has.
        has_masks, has_ann_ids: whether regions have masks and annotation ids.

    ``len(store)`` is the number of images, iterating gives their ids, ``store[image_id]`` is a `Regions`.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        self.classes: list[dict[str, Any]] = json.loads(file.attrs["classes"])
        self.recipe = str(file.attrs["recipe"])
        self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
        self.options: dict[str, Any] = json.loads(file.attrs["options"])
        self.complete = bool(file.attrs["complete"])
        self.image_ids: np.ndarray = file["images/id"][:]
        self._heights, self._widths = file["images/height"][:], file["images/width"][:]
        self._names = file["images/file_name"].asstr()[:]
        self._errors = file["images/error"].asstr()[:]
        self._region_start: np.ndarray = file["images/region_start"][:]
        self._at = {int(image_id): i for i, image_id in enumerate(self.image_ids)}
        self.feature_names = tuple(file["features"])
        self.has_masks = "mask_counts" in file["regions"]
        self.has_ann_ids = "ann_id" in file["regions"]

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[int]:
        return (int(image_id) for image_id in self.image_ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._at

    def __getitem__(self, image_id: int) -> Regions:
        return self.read(image_id)

    @property
    def errors(self) -> dict[int, str]:
        """The images that could not be used -> why."""
        return {int(i): str(error) for i, error in zip(self.image_ids, self._errors, strict=True) if error}

    @property
    def regions(self) -> int:
        """How many regions there are in all: rows are 0 .. regions - 1."""
        return int(self._region_start[-1])

    def rows(self, image_id: int) -> range:
        """The rows of an image's regions; KeyError for an image that is not in the store."""
        i = self._at[image_id]
        return range(int(self._region_start[i]), int(self._region_start[i + 1]))

    def region(self, row: int) -> tuple[int, int]:
        """The image a row belongs to and the region's place in that image's `Regions`; IndexError if outside."""
        if not 0 <= row < self.regions:
            raise IndexError(f"{self.path}: no region {row}, rows are 0 to {self.regions - 1}")
        i = int(np.searchsorted(self._region_start, row, side="right")) - 1
        return int(self.image_ids[i]), row - int(self._region_start[i])

    def read(self, image_id: int, features: Sequence[str] | None = None) -> Regions:
        """The regions of an image.

        Arguments:
            image_id: KeyError for an image that is not in the store.
            features: those to read, None for all of the store's.
        """
        rows = self.rows(image_id)
        try:
            return self._read(image_id, rows, self.feature_names if features is None else features)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path}: damaged: {error}; extract it again") from None

    def _read(self, image_id: int, rows: range, features: Sequence[str]) -> Regions:
        i = self._at[image_id]
        part = slice(rows.start, rows.stop)
        table = self._file["regions"]
        masks = None
        if self.has_masks:
            starts = table["mask_start"][rows.start : rows.stop + 1]
            text = table["mask_counts"][starts[0] : starts[-1]].tobytes()
            cuts = starts - starts[0]
            masks = tuple(text[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True))
        return Regions(
            image_id=image_id,
            file_name=str(self._names[i]),
            height=int(self._heights[i]),
            width=int(self._widths[i]),
            boxes=table["box"][part],
            scores=table["score"][part],
            category_ids=table["category_id"][part],
            ann_ids=table["ann_id"][part] if self.has_ann_ids else None,
            masks=masks,
            features={name: self._file[f"features/{name}"][part] for name in features},
            error=str(self._errors[i]),
        )


def open(path: str | Path) -> Store:
    """Open a store for reading; use it in a ``with``.

    Raises:
        InputError: no such file, not HDF5, another schema, parts missing, or not complete.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; refdet extract-features writes it")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file: {error}") from None
    try:
        schema = file.attrs.get("schema")
        if schema != SCHEMA:
            found = "no schema" if schema is None else f"schema {schema!r}"
            raise InputError(f"{path}: {found}, not {SCHEMA!r}; is it a file of refdet extract-features?")
        wanted = [f"images/{name}" for name in _IMAGE_COLUMNS]
        wanted += ["regions/box", "regions/score", "regions/category_id", "features"]
        missing = [f"attribute {name}" for name in _ATTRIBUTES if name not in file.attrs]
        missing += [name for name in wanted if name not in file]
        if missing:
            raise InputError(f"{path}: lacks {', '.join(missing)}; extract it again")
        if not file.attrs["complete"]:
            raise InputError(f"{path}: is not complete; extract it again")
        return Store(path, file)
    except BaseException as error:
        file.close()
        if isinstance(error, (OSError, ValueError, KeyError, RuntimeError)):  # damaged inside
            raise InputError(f"{path}: damaged: {error}; extract it again") from None
        raise


def _starts(counts: Sequence[int]) -> np.ndarray:
    """(n + 1,) int64: where each of n runs of these lengths starts, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64), dtype=np.int64)])
