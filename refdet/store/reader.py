"""`Store`: reader of a store, an HDF5 file with schema ``refdet-features/1``. No torch."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import h5py
import numpy as np

from refdet.errors import ArgumentError, InputError
from refdet.files.short_text import format_count
from refdet.store.codec import MASK_COUNTS, EncodedImage, decode, image_row
from refdet.store.hdf5_access import open_store_file
from refdet.store.schema import (
    MAPS,
    SCHEMA,
    Columns,
    Header,
    ImageRow,
    check_memory,
    check_parts,
    check_starts,
    open_datasets,
    parse_classes,
    parse_json,
    parse_run,
)
from refdet.store.writer import StoreWriter, create
from refdet.structures.regions import Regions
from refer.rle import total_run_lengths

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CORRUPTION_ERRORS", "SCHEMA", "Columns", "Header", "ImageRow", "Store", "StoreWriter", "create", "open"]

# Exceptions that h5py, numpy and json raise on damaged contents.
CORRUPTION_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError, OverflowError)


class Store:
    """A store, an HDF5 file of regions that are read on demand; created by `open`.

    ``len(store)`` is the number of images I, and iteration yields their ids. ``store[image_id]`` is a `Regions`;
    ``store[10:20]`` is a list of the `Regions` at these *positions* in the file. An integer is always an id.

    Args:
        path: the file.
        file: the open file.

    Attributes:
        path: the file.
        image_ids: (I,) int64 image ids, in file order.
        heights: (I,) int32 image heights in pixels.
        widths: (I,) int32 image widths in pixels.
        file_names: (I,) image file names.
        image_errors: (I,) why each image is unusable, "" if it is usable.
        region_start: (I + 1,) int64 row of the first region of each image, and the total number of regions.
        classes: ``[{"id": int, "name": str}]``: categories of the detector, followed by others of given annotations or
            boxes; only those of the annotations or boxes if an id has different names in the two, or if an older
            version started the store.
        names: category id -> name.
        recipe: recipe of the detector as text.
        provenance: provenance of the detector as JSON.
        options: options of the extraction.
        run: information about the run that wrote the file, {} if it is not recorded.
        feature_names: names of the features.
        map_names: names of the feature maps of whole images.
        has_masks: whether regions have masks.
        has_ann_ids: whether regions have annotation ids.
        file: the h5py file.
        data: open datasets by name, such as ``data["regions/box"]``.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self.file = file
        self.classes: list[dict[str, Any]] = parse_classes(file)
        self.names: dict[int, str] = {category["id"]: category["name"] for category in self.classes}
        self.recipe = str(file.attrs["recipe"])
        self.provenance: dict[str, Any] = parse_json(file, "provenance", dict)
        self.options: dict[str, Any] = parse_json(file, "options", dict)
        has_run = "run" in file.attrs
        self.run: dict[str, Any] = parse_json(file, "run", dict, partial(parse_run, path)) if has_run else {}
        self.feature_names = tuple(file["features"])
        self.map_names = tuple(name for name in MAPS if f"maps/{name}" in file)
        self.has_masks = "mask_counts" in file["regions"]
        self.has_ann_ids = "ann_id" in file["regions"]
        # kept open, as looking up a dataset by name takes longer than reading the rows of an image
        self.data = open_datasets(file)
        self.image_ids: np.ndarray = self.data["images/id"][:]
        self.heights, self.widths = self.data["images/height"][:], self.data["images/width"][:]
        self.file_names = self.data["images/file_name"].asstr()[:]
        self.image_errors = self.data["images/error"].asstr()[:]
        self.region_start: np.ndarray = self.data["images/region_start"][:]
        self._index = {image_id: i for i, image_id in enumerate(self.image_ids.tolist())}
        check_starts("images/region_start", self.region_start, len(self.data["regions/box"]))
        if len(self._index) != len(self.image_ids):
            raise ValueError("images/id: duplicate image")
        if min(self.heights.min(initial=1), self.widths.min(initial=1)) < 1:  # initial for stores without images
            raise ValueError("images/height or images/width is not positive")
        self._map_starts = {name: self.data[f"maps/{name}_start"][:] for name in self.map_names}
        self._map_shapes = {name: self.data[f"maps/{name}_shape"][:] for name in self.map_names}
        for name, starts in self._map_starts.items():
            check_starts(f"maps/{name}_start", starts, len(self.data[f"maps/{name}"]))
        starts_by_dataset = {f"features/{name}": self.region_start for name in self.feature_names}
        starts_by_dataset |= {f"maps/{name}": starts for name, starts in self._map_starts.items()}
        check_memory(self.data, starts_by_dataset, file.id.get_filesize())

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __repr__(self) -> str:
        names = ", ".join((*self.feature_names, *self.map_names)) or "no features"
        masks = ", masks" if self.has_masks else ""
        counts = f"{format_count(len(self), 'image')}, {format_count(self.regions, 'region')}"
        return f"Store({str(self.path)!r}: {counts}, {names}{masks})"

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[int]:
        return (int(image_id) for image_id in self.image_ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._index

    @overload
    def __getitem__(self, key: int) -> Regions: ...
    @overload
    def __getitem__(self, key: slice) -> list[Regions]: ...
    def __getitem__(self, key: int | slice) -> Regions | list[Regions]:
        if isinstance(key, slice):
            return [self.read(image_id) for image_id in self.image_ids[key].tolist()]
        return self.read(key)

    @cached_property
    def errors(self) -> dict[int, str]:
        """Image id -> why the image is unusable, for unusable images; cached, as a large store takes milliseconds."""
        return {int(i): str(error) for i, error in zip(self.image_ids, self.image_errors, strict=True) if error}

    @property
    def regions(self) -> int:
        """Total number of regions; rows are 0 to regions - 1."""
        return int(self.region_start[-1])

    def rows(self, image_id: int) -> range:
        """Rows of the regions of an image; raises KeyError for an unknown image."""
        i = self._index[image_id]
        return range(int(self.region_start[i]), int(self.region_start[i + 1]))

    def region(self, row: int) -> tuple[int, int]:
        """Image id of the region in a row, and its index in the `Regions` of that image.

        Raises:
            IndexError: there is no such row.
            TypeError: the row is not an integer.
        """
        row = operator.index(row)
        if not 0 <= row < self.regions:
            raise IndexError(f"{self.path}: no region {row}, rows are 0 to {self.regions - 1}")
        i = int(np.searchsorted(self.region_start, row, side="right")) - 1
        return int(self.image_ids[i]), row - int(self.region_start[i])

    def _reading_error(self, error: Exception) -> InputError:
        """The error to raise for an exception of `CORRUPTION_ERRORS`: the file is damaged, or was closed."""
        if not self.file:
            return InputError(f"{self.path}: the store is closed; read it before that, or open it again")
        return InputError(f"{self.path}: damaged: {error}; extract it again")

    def boxes(self, image_id: int) -> np.ndarray:
        """Boxes (n, 4) of an image, float32 half-open xyxy in pixels, without reading anything else.

        Raises:
            KeyError: unknown image.
            InputError: the file is damaged or closed.
        """
        rows = self.rows(image_id)
        try:
            boxes: np.ndarray = self.data["regions/box"][rows.start : rows.stop]
        except CORRUPTION_ERRORS as error:
            raise self._reading_error(error) from None
        return boxes

    def read(self, image_id: int, features: Sequence[str] | None = None) -> Regions:
        """Read the regions of an image.

        Args:
            image_id: the image.
            features: names of features and maps to read, None for all.

        Returns:
            The regions.

        Raises:
            ArgumentError: ``features`` is not a list.
            KeyError: unknown image or feature.
            InputError: the file is damaged or closed.
        """
        if isinstance(features, str):
            raise ArgumentError("features", f"a list of names is needed, not {features!r}")
        rows = self.rows(image_id)
        names = (*self.feature_names, *self.map_names) if features is None else tuple(features)
        unknown = [name for name in names if name not in self.feature_names and name not in self.map_names]
        if unknown:
            raise KeyError(
                f"{self.path}: no feature {unknown[0]!r}; choose from {[*self.feature_names, *self.map_names]}"
            )
        try:
            return self._read(image_id, rows, names)
        except CORRUPTION_ERRORS as error:
            raise self._reading_error(error) from None

    def _read(self, image_id: int, rows: range, requested: Sequence[str]) -> Regions:
        """Read the regions of an image, given their rows and the requested features and maps."""
        i = self._index[image_id]
        names = ["regions/box", "regions/score", "regions/category_id"] + ["regions/ann_id"] * self.has_ann_ids
        names += [f"features/{name}" for name in requested if name in self.feature_names]
        arrays = {name: self.data[name][rows.start : rows.stop] for name in names}
        mask_sizes: Sequence[int] = ()
        if self.has_masks:
            arrays[MASK_COUNTS], mask_sizes = self._read_masks(i, rows)
        for name in requested:
            if name in self.map_names and self._map_shapes[name][i].any():
                arrays[f"maps/{name}"], arrays["maps/im_info"] = self._read_map(name, i), self.data["maps/im_info"][i]
        row = image_row(
            arrays,
            image_id=int(image_id),
            file_name=str(self.file_names[i]),
            height=int(self.heights[i]),
            width=int(self.widths[i]),
            error=str(self.image_errors[i]),
        )
        return decode(EncodedImage(row, mask_sizes, arrays), self.names)

    def _read_masks(self, i: int, rows: range) -> tuple[np.ndarray, list[int]]:
        """Concatenated masks of the image at position ``i``, and the number of bytes of each."""
        counts = self.data["regions/mask_counts"]
        starts = self.data["regions/mask_start"][rows.start : rows.stop + 1]
        if starts[0] < 0 or starts[-1] > len(counts) or (starts[1:] < starts[:-1]).any():
            raise ValueError(
                f"regions/mask_start of rows {rows.start} to {rows.stop} does not ascend, or is out of range"
            )
        masks: np.ndarray = counts[int(starts[0]) : int(starts[-1])]
        # pycocotools would write out of bounds for an RLE that does not match its image
        totals = total_run_lengths(masks, starts - starts[0])
        if totals is None or (totals != int(self.heights[i]) * int(self.widths[i])).any():
            raise ValueError(
                f"regions/mask_counts: a mask of image {self.image_ids[i]} is invalid, or its runs do not add up to "
                f"{self.widths[i]}x{self.heights[i]} pixels"
            )
        return masks, np.diff(starts).tolist()

    def _read_map(self, name: str, i: int) -> np.ndarray:
        """A feature map of the image at position ``i``, (C, H, W)."""
        first, last = self._map_starts[name][i : i + 2].tolist()
        values: np.ndarray = self.data[f"maps/{name}"][first:last]
        shape = self._map_shapes[name][i].tolist()
        if min(shape) < 0 or math.prod(shape) != len(values):
            length = format_count(len(values), "value")
            raise ValueError(f"maps/{name} of image {self.image_ids[i]} has {length} for shape {shape}")
        return values.reshape(shape)

    def frame(self) -> pd.DataFrame:
        """Deprecated alias of `to_dataframe`, to be removed in the next version."""
        warnings.warn("Store.frame was renamed to to_dataframe", DeprecationWarning, stacklevel=2)
        return self.to_dataframe()

    def to_dataframe(self) -> pd.DataFrame:
        """Convert all regions, without features and masks, to a data frame.

        Returns:
            One row per region, indexed by ``region``, its row in the file. Columns: ``image_id``, ``x1``, ``y1``,
            ``x2``, ``y2`` (half-open, pixels of the original image), ``area`` (of the box, square pixels), ``score``,
            ``category_id``, ``category`` (its name), and ``ann_id`` if the store has it.

        Raises:
            InputError: the file is damaged or closed.
        """
        import pandas as pd

        try:
            boxes = self.data["regions/box"][:]
            categories = self.data["regions/category_id"][:]
            columns = {"image_id": np.repeat(self.image_ids, np.diff(self.region_start))}
            columns |= dict(zip(("x1", "y1", "x2", "y2"), boxes.T, strict=True))
            with np.errstate(all="ignore"):  # boxes of a damaged file may not be finite
                columns["area"] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            columns["score"], columns["category_id"] = self.data["regions/score"][:], categories
            frame = pd.DataFrame(columns)
            with pd.option_context("mode.string_storage", "python"):  # PyArrow's strings cannot have surrogates
                frame["category"] = frame["category_id"].map(self.names).astype("category")
            if self.has_ann_ids:
                frame["ann_id"] = self.data["regions/ann_id"][:]
        except CORRUPTION_ERRORS as error:
            raise self._reading_error(error) from None
        return frame.rename_axis("region")


def open(path: str | Path, *, again: bool = False) -> Store:
    """Open a store for reading, as a context manager.

    Examples:
        >>> with refdet.open_store("demo/features/refcoco.h5") as store:
        ...     regions = store[store.image_ids[0]]
        ...     table = store.to_dataframe()
        >>> len(table) >= len(regions)
        True

    Args:
        path: the store.
        again: check the structure of the file even if it was checked before and has not changed.

    Returns:
        The store.

    Raises:
        InputError: the file does not exist, is not HDF5, has another schema, has missing or unsupported parts, or is
            incomplete.
    """
    path = Path(path)
    file = open_store_file(path, again)
    try:
        check_parts(path, file)
        if not file.attrs["complete"]:
            raise InputError(f"{path}: incomplete; extract it again")
        return Store(path, file)
    except BaseException as error:
        file.close()
        if isinstance(error, CORRUPTION_ERRORS):
            raise InputError(f"{path}: damaged: {error}; extract it again") from None
        raise
