"""Schema, header and checksums of a store."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from refdet.errors import InputError
from refdet.files.short_text import agree, format_count
from refdet.files.strict_json import finite_json, json_with_nulls

log = logging.getLogger(__name__)

SCHEMA_PREFIX = "refdet-features/"
SCHEMA = SCHEMA_PREFIX + "1"
CHECKSUMS = "checksums/crc32"
COMPRESSIONS = ("none", "gzip", "lzf")
MAPS = ("head",)  # feature maps of whole images; MAttNet calls the map from which regions are pooled "head"

# Columns that every store has; for image columns, name -> kind of dtype.
IMAGE_COLUMNS = {
    "id": "int",
    "file_name": "text",
    "height": "int",
    "width": "int",
    "region_start": "int",
    "error": "text",
}
REGION_COLUMNS = ("box", "score", "category_id")
# Allowed dtypes of each kind; text is variable-length strings.
DTYPES = {
    "int": ("int32", "int64"),
    "float": ("float32", "float16"),
    "float32": ("float32",),
    "uint8": ("uint8",),
    "text": ("object",),
}
# Maximum size in memory of a feature or map of one image, or 4 times the size of the file if that is more. Without this
# limit, a small file could take any amount of memory, as zeros compress a thousandfold.
MAX_IMAGE_BYTES = 2**30
# Attributes that every store has, besides the schema.
ATTRIBUTES = ("classes", "recipe", "provenance", "options", "complete")


@dataclass(frozen=True)
class Header:
    """Metadata of a store.

    Attributes:
        classes: ``[{"id": int, "name": str}]``: categories of the detector, followed by others of given annotations or
            boxes; only those of the annotations or boxes if an id has different names in the two, or if an older
            version started the store.
        recipe: recipe of the detector as text.
        provenance: provenance of the detector (`refdet.structures.provenance.Provenance`) as JSON.
        options: options of the extraction, as JSON.
    """

    classes: list[dict[str, Any]]
    recipe: str
    provenance: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Optional columns of a store.

    Attributes:
        features: feature name -> shape per region, such as ``(1024,)`` or ``(2048, 7, 7)``.
        dtype: dtype of features and maps, "float32" or "float16".
        masks: whether regions have masks.
        ann_ids: whether regions have annotation ids.
        maps: names of the maps of whole images, ``()`` or ``("head",)``.
        compression: compression of features and maps, "none", "gzip" or "lzf".
    """

    features: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: str = "float32"
    masks: bool = False
    ann_ids: bool = False
    maps: tuple[str, ...] = ()
    compression: str = "none"

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression {self.compression!r}: must be one of {COMPRESSIONS}")
        if set(self.maps) - set(MAPS):
            raise ValueError(f"maps {self.maps}: must be among {MAPS}")

    def is_compressed(self, dataset: str) -> bool:
        """Whether a dataset, given by its full name, is compressed."""
        is_feature_or_map = dataset.startswith("features/") or dataset in [f"maps/{name}" for name in self.maps]
        return is_feature_or_map and self.compression != "none"

    def checksum_names(self) -> tuple[str, ...]:
        """What each column of ``/checksums/crc32`` is for: a dataset, or "images" for an image's row of ``/images``."""
        regions = [*REGION_COLUMNS] + ["ann_id"] * self.ann_ids + ["mask_start", "mask_counts"] * self.masks
        maps = [f"maps/{name}" for map_ in self.maps for name in (map_, f"{map_}_shape", "im_info")]
        return (
            "images",
            *(f"regions/{name}" for name in regions),
            *(f"features/{name}" for name in self.features),
            *maps,
        )


class ImageRow(NamedTuple):
    """An image of a store, with the sizes that must be known before its regions are written.

    Attributes:
        id: image id.
        file_name: file name of the image.
        height: in pixels.
        width: in pixels.
        error: why the image is unusable, "" if it is usable.
        regions: number of regions.
        mask_bytes: total size of the masks in bytes.
        map_shape: (C, H, W) of the head map, zeros if there is none.
    """

    id: int
    file_name: str
    height: int
    width: int
    error: str
    regions: int
    mask_bytes: int
    map_shape: tuple[int, int, int] = (0, 0, 0)


def starts_from_counts(counts: Sequence[int]) -> np.ndarray:
    """Start of each of N consecutive runs of these lengths, and the end of the last run, (N + 1,) int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64), dtype=np.int64)])


def image_checksum(image_id: int, height: int, width: int, first: int, last: int, file_name: str, error: str) -> int:
    """Checksum of an image's row of ``/images``.

    Args:
        image_id: id of the image.
        height: in pixels.
        width: in pixels.
        first: row of the image's first region.
        last: row after the image's last region.
        file_name: file name of the image.
        error: why the image is unusable, or "".

    Returns:
        CRC-32 of the fields as tab-separated text.
    """
    text = f"{image_id}\t{height}\t{width}\t{first}\t{last}\t{file_name}\t{error}"
    return zlib.crc32(text.encode("utf-8", "surrogateescape"))


def attributes_checksum(attributes: Mapping[str, Any]) -> int:
    """CRC-32 of the attributes schema, classes, recipe, provenance and options, separated by NUL."""
    texts = (str(attributes[name]) for name in ("schema", "classes", "recipe", "provenance", "options"))
    return zlib.crc32("\0".join(texts).encode("utf-8", "surrogateescape"))


def check_parts(path: Path, file: h5py.File) -> None:
    """Check that a file is a store with this schema and all required parts.

    Args:
        path: the file, for error messages.
        file: the open file.

    Raises:
        InputError: the file has another schema, or lacks a part.
    """
    schema = file.attrs.get("schema")
    if not isinstance(schema, str) or schema != SCHEMA:
        actual = "no schema" if schema is None else f"schema {schema!r:.60}"
        raise InputError(
            f"{path}: not a feature store: {actual} instead of {SCHEMA!r}; give a file written by refdet "
            "extract-features"
        )
    required = [f"images/{name}" for name in IMAGE_COLUMNS] + [f"regions/{name}" for name in REGION_COLUMNS]
    missing = [f"attribute {name}" for name in ATTRIBUTES if name not in file.attrs]
    missing += [name for name in [*required, "features"] if name not in file]
    if missing:
        raise InputError(f"{path}: missing {', '.join(missing)}; extract it again")


def open_datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Open all datasets of a store that passed `check_parts`.

    Args:
        file: the open file.

    Returns:
        Datasets by name, such as ``data["regions/box"]``.

    Raises:
        ValueError: a dataset has an invalid type or shape, or is missing although another one requires it.
    """
    images, regions = (_open_dataset(file, name).len() for name in ("images/id", "regions/box"))
    # name -> kind of dtype, and shape; the starts of images have one more value, the end
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        f"images/{name}": (kind, (images + (name == "region_start"),)) for name, kind in IMAGE_COLUMNS.items()
    }
    expected["regions/box"] = ("float32", (regions, 4))
    expected["regions/score"] = ("float32", (regions,))
    expected["regions/category_id"] = ("int", (regions,))
    if "ann_id" in file["regions"]:
        expected["regions/ann_id"] = ("int", (regions,))
    if "mask_counts" in file["regions"] or "mask_start" in file["regions"]:
        expected["regions/mask_counts"] = ("uint8", _open_dataset(file, "regions/mask_counts").shape[:1])
        expected["regions/mask_start"] = ("int", (regions + 1,))
    for name in file["features"]:
        expected[f"features/{name}"] = ("float", (regions, *_open_dataset(file, f"features/{name}").shape[1:]))
    for name in MAPS:
        if f"maps/{name}" in file:
            expected[f"maps/{name}"] = ("float", _open_dataset(file, f"maps/{name}").shape[:1])
            expected[f"maps/{name}_start"] = ("int", (images + 1,))
            expected[f"maps/{name}_shape"] = ("int", (images, 3))
            expected["maps/im_info"] = ("float32", (images, 3))
    data = {name: _open_dataset(file, name) for name in expected}
    for name, (kind, shape) in expected.items():
        if data[name].dtype not in DTYPES[kind] or data[name].shape != shape:
            raise ValueError(f"{name} has dtype {data[name].dtype} and shape {data[name].shape}")
        if kind == "text" and h5py.check_string_dtype(data[name].dtype) is None:
            raise ValueError(f"{name} is not text")
    return data


def _open_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Open a dataset with rows; raises ValueError if it is missing, a scalar or a group."""
    if name not in file:
        raise ValueError(f"{name} is missing")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
        raise ValueError(f"{name} is not an array")
    return dataset


def check_starts(name: str, starts: np.ndarray, end: int) -> None:
    """Check the starts of consecutive runs, as from `starts_from_counts`.

    Args:
        name: dataset of the starts, for error messages.
        starts: (N + 1,) start of each of N runs, and the end of the last run.
        end: total length of the runs.

    Raises:
        ValueError: the starts do not ascend from 0 to ``end``.
    """
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != end or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{name} does not ascend from 0 to {end}")


def parse_json(file: h5py.File, name: str, kind: type, parse: Callable[[str | bytes], Any] = finite_json) -> Any:
    """Parse an attribute that is a JSON list or object; raises ValueError if it is not."""
    text = file.attrs[name]
    if not isinstance(text, str | bytes):
        raise ValueError(f"attribute {name} is not text")
    try:
        value = parse(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"attribute {name} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"attribute {name} is not a JSON {'list' if kind is list else 'object'}")
    return value


def parse_run(path: Path, text: bytes | str) -> Any:
    """Parse the attribute ``run`` of the store at ``path``; raises ValueError or RecursionError if it is not JSON.

    It is only for information, so numbers that are not finite do not make the store unusable: they become None.
    """
    value, replaced = json_with_nulls(text)
    if replaced:
        log.warning(
            "note: %s: attribute run has %s that %s not finite and read as null",
            path,
            format_count(replaced, "number"),
            agree(replaced, "is"),
        )
    return value


def parse_classes(file: h5py.File) -> list[dict[str, Any]]:
    """Parse the attribute ``classes``; raises ValueError if it is not ``[{"id": int, "name": str}]``."""
    classes: list[dict[str, Any]] = parse_json(file, "classes", list)
    for category in classes:
        id_ = category.get("id") if isinstance(category, dict) else None
        if type(id_) is not int or not -(2**63) <= id_ < 2**63 or not isinstance(category.get("name"), str):
            raise ValueError("attribute classes is not a list of ids and names")
    return classes


def check_memory(data: Mapping[str, h5py.Dataset], starts: Mapping[str, np.ndarray], size: int) -> None:
    """Check that no feature or map of an image takes too much memory (`MAX_IMAGE_BYTES`).

    Args:
        data: datasets by name.
        starts: name of a feature or map -> (I + 1,) first row of each image in that dataset, and the end.
        size: size of the file in bytes.

    Raises:
        ValueError: a feature or map of an image takes too much memory.
    """
    for name, image_starts in starts.items():
        rows = int(np.diff(image_starts).max(initial=0))
        nbytes = rows * math.prod(data[name].shape[1:]) * data[name].dtype.itemsize
        if nbytes > max(MAX_IMAGE_BYTES, 4 * size):
            raise ValueError(f"{name} of an image takes {nbytes} bytes, but the file has {size}")
