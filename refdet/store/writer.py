"""Writer of the HDF5 file of regions. No torch."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from refdet.files.atomic import atomic_write
from refdet.store.chunks import GZIP_LEVEL, THREADS, ChunkedWriter, chunk_rows
from refdet.store.hdf5_door import remember
from refdet.store.hdf5_file import new_file
from refdet.store.schema import (
    CHECKSUMS,
    SCHEMA,
    Columns,
    Header,
    ImageRow,
    attributes_checksum,
    image_checksum,
    starts_of,
)
from refdet.structures.regions import Regions


class StoreWriter:
    """Writes regions to a new store, image by image in file order; created by `create`.

    Datasets have their final size from the start. Only one image, and a chunk of each compressed dataset, is in memory.

    Args:
        file: the file, open for writing.
        header: metadata of the store.
        columns: optional columns of the store.
        images: all images in file order.
        pool: threads for compression.
    """

    def __init__(
        self,
        file: h5py.File,
        header: Header,
        columns: Columns,
        images: Sequence[ImageRow],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._file = file
        self._columns = columns
        self._images = images
        if len({image.id for image in images}) != len(images):
            raise ValueError("duplicate image")
        self._next = 0  # index of the next image
        self._region_start = starts_of([image.regions for image in images])
        self._mask_start = starts_of([image.mask_bytes for image in images])
        self._head_start = starts_of([math.prod(image.map_shape) for image in images])
        self._finished = False
        self._names = columns.names()
        self._checksums = np.zeros((len(images), len(self._names)), np.uint32)
        file.attrs["schema"] = SCHEMA
        file.attrs["classes"] = json.dumps(header.classes)
        file.attrs["recipe"] = header.recipe
        file.attrs["provenance"] = json.dumps(header.provenance)
        file.attrs["options"] = json.dumps(header.options)
        file.attrs["complete"] = False
        # Kept open, as closing a dataset on a full disk crashes HDF5 (`new_file`).
        self._data: dict[str, h5py.Dataset] = {}
        self._describe_images(images)
        self._make_columns()
        self._chunks = {name: ChunkedWriter(data, pool) for name, data in self._data.items() if data.chunks}

    @property
    def path(self) -> Path:
        """Temporary path of the file."""
        return Path(self._file.filename)

    def _describe_images(self, images: Sequence[ImageRow]) -> None:
        for name, dtype in (("id", np.int64), ("height", np.int32), ("width", np.int32)):
            values = np.array([getattr(image, name) for image in images], dtype)
            self._new(f"images/{name}", values.shape, values.dtype, values)
        for name in ("file_name", "error"):
            strings = np.array([getattr(image, name) for image in images], dtype=object)
            self._new(f"images/{name}", strings.shape, h5py.string_dtype("utf-8"), strings)
        self._new("images/region_start", self._region_start.shape, np.dtype(np.int64), self._region_start)

    def _make_columns(self) -> None:
        columns, n, count = self._columns, int(self._region_start[-1]), len(self._images)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "regions/box": ((n, 4), np.float32),
            "regions/score": ((n,), np.float32),
            "regions/category_id": ((n,), np.int64),
        }
        if columns.ann_ids:
            shapes["regions/ann_id"] = ((n,), np.int64)
        if columns.masks:
            shapes["regions/mask_counts"] = ((int(self._mask_start[-1]),), np.uint8)
            shapes["regions/mask_start"] = ((n + 1,), np.int64)
        for name, shape in columns.features.items():
            shapes[f"features/{name}"] = ((n, *shape), np.dtype(columns.dtype))
        self._file.create_group("features")
        for name in columns.maps:
            shapes[f"maps/{name}"] = ((int(self._head_start[-1]),), np.dtype(columns.dtype))
            shapes[f"maps/{name}_shape"] = ((count, 3), np.int32)
            shapes["maps/im_info"] = ((count, 3), np.float32)
            self._new(f"maps/{name}_start", self._head_start.shape, np.dtype(np.int64), self._head_start)
        for name, (shape, dtype) in shapes.items():
            self._new(name, shape, np.dtype(dtype))
        if columns.masks:
            self._data["regions/mask_start"][0] = 0

    def _new(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray | None = None
    ) -> h5py.Dataset:
        options: dict[str, Any] = {}
        if self._columns.is_compressed(name) and 0 not in shape:
            chunk = (chunk_rows(shape, dtype), *shape[1:])
            options = {"chunks": chunk, "compression": self._columns.compression, "shuffle": True}
            if self._columns.compression == "gzip":
                options["compression_opts"] = GZIP_LEVEL
        data = self._data[name] = self._file.create_dataset(name, shape, dtype, track_times=False, **options)
        if values is not None and values.size:
            data[...] = values
        return data

    def put(self, regions: Regions) -> None:
        """Write the regions of the next image.

        Args:
            regions: the regions.

        Raises:
            ValueError: they do not match ``images``.
        """
        i = self._next
        if i == len(self._images) or regions.image_id != self._images[i].id:
            wanted = "no image" if i == len(self._images) else f"image {self._images[i].id}"
            raise ValueError(f"image {regions.image_id}: expected {wanted} next")
        self._next += 1
        first, last = int(self._region_start[i]), int(self._region_start[i + 1])
        if len(regions) != last - first:
            raise ValueError(f"image {regions.image_id}: {len(regions)} regions, expected {last - first}")
        image = self._images[i]
        checksum = image_checksum(image.id, image.height, image.width, first, last, image.file_name, image.error)
        self._checksums[i, 0] = checksum
        if first < last:
            self._put_columns(i, regions, slice(first, last))
        if self._columns.maps:
            self._put_maps(i, regions)

    def _put_columns(self, i: int, regions: Regions, rows: slice) -> None:
        self._write(i, "regions/box", rows, regions.boxes)
        self._write(i, "regions/score", rows, regions.scores)
        self._write(i, "regions/category_id", rows, regions.category_ids)
        if self._columns.ann_ids:
            if regions.ann_ids is None:
                raise ValueError(f"image {regions.image_id}: no annotation ids")
            self._write(i, "regions/ann_id", rows, regions.ann_ids)
        if self._columns.masks:
            if regions.masks is None:
                raise ValueError(f"image {regions.image_id}: no masks")
            start, stop = int(self._mask_start[i]), int(self._mask_start[i + 1])
            text = np.frombuffer(b"".join(regions.masks), np.uint8)
            self._write(i, "regions/mask_counts", slice(start, stop), text)
            ends = start + np.cumsum([len(mask) for mask in regions.masks])
            self._write(i, "regions/mask_start", slice(rows.start + 1, rows.stop + 1), ends)
        for name in self._columns.features:
            self._write(i, f"features/{name}", rows, regions.features[name])

    def _put_maps(self, i: int, regions: Regions) -> None:
        shape, row = self._images[i].map_shape, slice(i, i + 1)
        for name in self._columns.maps:
            values = regions.maps.get(name)
            found = (0, 0, 0) if values is None else values.shape
            if found != tuple(shape):
                raise ValueError(f"image {regions.image_id}: {name} map has shape {found}, expected {shape}")
            self._write(i, f"maps/{name}_shape", row, np.array([shape], np.int32))
            if values is not None:
                cells = slice(int(self._head_start[i]), int(self._head_start[i + 1]))
                self._write(i, f"maps/{name}", cells, values.reshape(-1))
        info = np.zeros(3, np.float32) if regions.im_info is None else regions.im_info
        self._write(i, "maps/im_info", row, info[None])

    def _write(self, i: int, name: str, rows: slice, values: np.ndarray) -> None:
        """Write rows of a dataset and record their checksum for image ``i``."""
        data = self._data[name]
        values = np.ascontiguousarray(values, data.dtype)
        if values.shape != (rows.stop - rows.start, *data.shape[1:]):
            wanted = (rows.stop - rows.start, *data.shape[1:])
            raise ValueError(f"image {self._images[i].id}: {name} has shape {values.shape}, expected {wanted}")
        if name in self._chunks:
            self._chunks[name].append(values)
        elif values.size:
            data[rows] = values
        self._checksums[i, self._names.index(name)] = zlib.crc32(values.data) if values.size else 0

    def finish(self, run: Mapping[str, Any] | None = None) -> None:
        """Mark the store complete; called by `create` if the caller does not.

        Args:
            run: information about the run, such as images/s; JSON. The only part in which two stores with the same
                contents may differ.

        Raises:
            ValueError: images are missing.
        """
        if self._finished:
            return
        if missing := self._images[self._next :]:
            raise ValueError(f"{len(missing)} images were not written, first: {missing[0].id}")
        for chunks in self._chunks.values():
            chunks.finish()
        sums = self._new(CHECKSUMS, self._checksums.shape, self._checksums.dtype, self._checksums)
        sums.attrs["columns"] = json.dumps(self._names)
        sums.attrs["attributes"] = attributes_checksum(self._file.attrs)
        if run:
            self._file.attrs["run"] = json.dumps(dict(run))
        self._file.attrs["complete"] = True
        self._finished = True


@contextmanager
def create(
    path: Path, header: Header, columns: Columns, images: Sequence[ImageRow], space: int = 0
) -> Iterator[StoreWriter]:
    """Write a store atomically.

    Args:
        path: the file.
        header: metadata of the store.
        columns: optional columns of the store.
        images: all images in file order.
        space: disk space in bytes to reserve before writing.

    Yields:
        The writer.
    """
    with (
        atomic_write(path) as temporary,
        new_file(temporary, space) as file,
        ThreadPoolExecutor(THREADS, "compress") as pool,
    ):
        writer = StoreWriter(file, header, columns, images, pool)
        yield writer
        writer.finish()
    remember(path)
