"""`StoreWriter`: writer of a store. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from refdet.files.atomic import atomic_write
from refdet.files.short_text import format_count
from refdet.store.chunks import GZIP_LEVEL, THREADS, ChunkedWriter, ContiguousWriter, chunk_rows, contiguous_layout
from refdet.store.codec import MASK_COUNTS, MASK_START, EncodedImage, RawImage, encode, raw_bytes, region_bytes
from refdet.store.crc import crc32
from refdet.store.hdf5_access import remember
from refdet.store.hdf5_file import new_file, reserve_between
from refdet.store.schema import (
    CHECKSUMS,
    SCHEMA,
    Columns,
    Header,
    ImageRow,
    attributes_checksum,
    image_checksum,
    starts_from_counts,
)
from refdet.store.size import contiguous_space
from refdet.structures.regions import Regions


class StoreWriter:
    """Writes regions to a new store, image by image in file order; created by `create`.

    Datasets have their final size from the start. In memory are the images of one `put`, and a few chunks of each
    compressed dataset.

    Args:
        file: the file, open for writing.
        header: metadata of the store.
        columns: optional columns of the store.
        images: all images in file order.
        pool: threads for compression.

    Raises:
        ValueError: two images have the same id.
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
            raise ValueError("duplicate image id")
        self._next = 0  # index of the next image
        self._region_start = starts_from_counts([image.regions for image in images])
        self._mask_start = starts_from_counts([image.mask_bytes for image in images])
        self._head_start = starts_from_counts([math.prod(image.map_shape) for image in images])
        self._finished = False
        self._checksum_names = columns.checksum_names()
        self._column_index = {name: column for column, name in enumerate(self._checksum_names)}
        self._raw_names = [*region_bytes(columns)]  # datasets of the parts of a `RawImage`
        self._raw_columns = [self._column_index[name] for name in self._raw_names]  # their columns of checksums
        self._checksums = np.zeros((len(images), len(self._checksum_names)), np.uint32)
        self._checksums[:, 0] = [
            image_checksum(row.id, row.height, row.width, first, last, row.file_name, row.error)
            for row, (first, last) in zip(images, pairwise(self._region_start.tolist()), strict=True)
        ]
        file.attrs["schema"] = SCHEMA
        file.attrs["classes"] = json.dumps(header.classes)
        file.attrs["recipe"] = header.recipe
        file.attrs["provenance"] = json.dumps(header.provenance)
        file.attrs["options"] = json.dumps(header.options)
        file.attrs["complete"] = False
        self._data: dict[str, h5py.Dataset] = {}  # kept open, as closing a dataset on a full disk crashes HDF5
        self._writers: dict[str, ChunkedWriter | ContiguousWriter] = {}  # for nonempty datasets
        self._row_types: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}  # dtype and shape of a row of each dataset
        self._pool = pool
        self._write_image_columns(images)
        self._create_columns()

    @property
    def path(self) -> Path:
        """Path of the temporary file that becomes the store."""
        return Path(self._file.filename)

    def reserve(self, space: int) -> None:
        """Reserve disk space for everything that HDF5 itself writes to the file.

        Args:
            space: maximum size of the file in bytes.
        """
        writers = [writer for writer in self._writers.values() if isinstance(writer, ContiguousWriter)]
        reserve_between(self._file, space, [writer.byte_range for writer in writers])

    def _write_image_columns(self, images: Sequence[ImageRow]) -> None:
        for name, dtype in (("id", np.int64), ("height", np.int32), ("width", np.int32)):
            values = np.array([getattr(image, name) for image in images], dtype)
            self._create_dataset(f"images/{name}", values.shape, values.dtype, values)
        for name in ("file_name", "error"):
            strings = np.array([getattr(image, name) for image in images], dtype=object)
            self._create_dataset(f"images/{name}", strings.shape, h5py.string_dtype("utf-8"), strings)
        self._create_dataset("images/region_start", self._region_start.shape, np.dtype(np.int64), self._region_start)

    def _create_columns(self) -> None:
        columns, n, num_images = self._columns, int(self._region_start[-1]), len(self._images)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "regions/box": ((n, 4), np.float32),
            "regions/score": ((n,), np.float32),
            "regions/category_id": ((n,), np.int64),
        }
        if columns.ann_ids:
            shapes["regions/ann_id"] = ((n,), np.int64)
        if columns.masks:
            shapes[MASK_COUNTS] = ((int(self._mask_start[-1]),), np.uint8)
            shapes[MASK_START] = ((n + 1,), np.int64)
        for name, shape in columns.features.items():
            shapes[f"features/{name}"] = ((n, *shape), np.dtype(columns.dtype))
        self._file.create_group("features")
        for name in columns.maps:
            shapes[f"maps/{name}"] = ((int(self._head_start[-1]),), np.dtype(columns.dtype))
            shapes[f"maps/{name}_shape"] = ((num_images, 3), np.int32)
            shapes["maps/im_info"] = ((num_images, 3), np.float32)
            self._create_dataset(f"maps/{name}_start", self._head_start.shape, np.dtype(np.int64), self._head_start)
        for name, (shape, dtype) in shapes.items():
            data = self._create_dataset(name, shape, np.dtype(dtype))
            self._row_types[name] = data.dtype, shape[1:]
            if data.size:
                self._writers[name] = ChunkedWriter(data, self._pool) if data.chunks else ContiguousWriter(data)
        if columns.masks:
            self._writers[MASK_START].append(memoryview(bytes(8)))  # the first start, 0, as int64

    def _create_dataset(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray | None = None
    ) -> h5py.Dataset:
        """Create a dataset with its values or, if these are None, for a writer that appends them."""
        options: dict[str, Any] = {"track_times": False}
        if self._columns.is_compressed(name) and 0 not in shape:
            chunk = (chunk_rows(shape, dtype), *shape[1:])
            options |= {"chunks": chunk, "compression": self._columns.compression, "shuffle": True}
            if self._columns.compression == "gzip":
                options["compression_opts"] = GZIP_LEVEL
        elif values is None:
            options = {"dcpl": contiguous_layout()}
        data = self._data[name] = self._file.create_dataset(name, shape, dtype, **options)
        if values is not None and values.size:
            data[...] = values
        return data

    def put(self, *images: Regions | EncodedImage | RawImage) -> None:
        """Write the regions of the next images.

        Args:
            images: the regions, or encoded images; raw images only in a store without maps. Writing several at once is
                faster.

        Raises:
            ValueError: the images do not match the next ones of the store, or lack a column.
        """
        for image in images:
            self._put(self._next, encode(image, self._columns) if isinstance(image, Regions) else image)
            self._next += 1
        for writer in self._writers.values():
            writer.flush_borrowed()

    def _put(self, i: int, image: EncodedImage | RawImage) -> None:
        if i == len(self._images) or image.row.id != self._images[i].id:
            expected = "no image" if i == len(self._images) else f"image {self._images[i].id}"
            raise ValueError(f"image {image.row.id}: expected {expected} next")
        row = self._images[i]
        if image.row.regions != row.regions:
            raise ValueError(f"image {row.id}: {format_count(image.row.regions, 'region')}, expected {row.regions}")
        if isinstance(image, RawImage):
            self._put_raw(i, image)
        else:
            self._put_arrays(i, image)
        if row.regions and self._columns.masks:
            sizes = image.mask_sizes
            mask_sizes = np.frombuffer(sizes, np.uint32) if isinstance(sizes, bytes) else np.array(sizes, np.int64)
            mask_ends = self._mask_start[i] + np.cumsum(mask_sizes, dtype=np.int64)
            self._append(i, MASK_START, mask_ends, row.regions)

    def _put_raw(self, i: int, image: RawImage) -> None:
        """Append the parts of image ``i`` except the ends of its masks, with their known checksums."""
        for name, part in zip(self._raw_names, image.parts, strict=True):
            if part:
                self._writers[name].append(part)
        if image.row.regions:
            self._checksums[i, self._raw_columns] = np.frombuffer(image.checksums, np.uint32)

    def _put_arrays(self, i: int, image: EncodedImage) -> None:
        """Append the arrays of image ``i`` except the ends of its masks, with their checksums."""
        row = self._images[i]
        if row.regions:
            for name in self._raw_names:
                rows = row.mask_bytes if name == MASK_COUNTS else row.regions
                self._append(i, name, image.arrays[name], rows, image.checksums.get(name))
        for name in self._columns.maps:
            values = image.arrays.get(f"maps/{name}", np.zeros((0, 0, 0), self._columns.dtype))
            if values.shape != tuple(row.map_shape):
                raise ValueError(f"image {row.id}: {name} map has shape {values.shape}, expected {row.map_shape}")
            self._append(i, f"maps/{name}", values.reshape(-1), values.size)
            self._append(i, f"maps/{name}_shape", np.array([row.map_shape], np.int32), 1)
            self._append(i, "maps/im_info", image.arrays.get("maps/im_info", np.zeros(3, np.float32))[None], 1)

    def _append(self, i: int, name: str, values: np.ndarray, rows: int, checksum: int | None = None) -> None:
        """Append the rows of image ``i`` to a dataset and record their checksum, computed if None is given."""
        dtype, shape = self._row_types[name]
        if values.shape != (rows, *shape) or values.dtype != dtype:
            raise ValueError(
                f"image {self._images[i].id}: {name} has dtype {values.dtype} and shape {values.shape}, "
                f"expected {dtype} and {(rows, *shape)}"
            )
        if values.size:
            data = raw_bytes(values)
            self._writers[name].append(data)
            self._checksums[i, self._column_index[name]] = crc32(data) if checksum is None else checksum

    def finish(self, run: Mapping[str, Any] | None = None) -> None:
        """Mark the store complete; called by `create` if the caller does not.

        Args:
            run: information about the run, such as images/s, as JSON; the only part in which two stores with the same
                contents may differ.

        Raises:
            ValueError: images are missing.
        """
        if self._finished:
            return
        if missing := self._images[self._next :]:
            raise ValueError(f"{format_count(len(missing), 'image', 'was')} not written, first: {missing[0].id}")
        for writer in self._writers.values():
            writer.finish()
        table = self._create_dataset(CHECKSUMS, self._checksums.shape, self._checksums.dtype, self._checksums)
        table.attrs["columns"] = json.dumps(self._checksum_names)
        table.attrs["attributes"] = attributes_checksum(self._file.attrs)
        if run:
            self._file.attrs["run"] = json.dumps(dict(run))
        self._file.attrs["complete"] = True
        self._finished = True


@contextmanager
def create(
    path: Path, header: Header, columns: Columns, images: Sequence[ImageRow], space: int = 0
) -> Iterator[StoreWriter]:
    """Write a store atomically: it replaces ``path`` when the block ends without an exception.

    Args:
        path: the file.
        header: metadata of the store.
        columns: optional columns of the store.
        images: all images in file order.
        space: maximum size of the store in bytes (`refdet.store.size.space_needed`), to reserve disk space before
            writing; 0 to reserve none.

    Yields:
        The writer.

    Raises:
        ValueError: two images have the same id, or the block has not written all images.
        OSError: not enough disk space.
    """
    # Without compression, most of the file is not written by HDF5 and need not be reserved, which would take as long as
    # writing it on some file systems.
    contiguous = contiguous_space(images, columns) if space and columns.compression == "none" else 0
    with (
        atomic_write(path) as temporary,
        new_file(temporary, space - contiguous) as file,
        ThreadPoolExecutor(THREADS, "compress") as pool,
    ):
        writer = StoreWriter(file, header, columns, images, pool)
        if contiguous:
            writer.reserve(space)
        yield writer
        writer.finish()
    remember(path)
