"""What writer, reader and verification of a store share: its schema, its header and its checksums."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from refdet.errors import InputError

FAMILY = "refdet-features/"
SCHEMA = FAMILY + "1"
CHECKSUMS = "checksums/crc32"
COMPRESSIONS = ("none", "gzip", "lzf")
MAPS = ("head",)

# What every store has; of the images with the kind of their dtype.
IMAGE_COLUMNS = {"id": "int", "file_name": "text", "height": "int", "width": "int", "region_start": "int",
                 "error": "text"}  # fmt: skip
REGION_COLUMNS = ("box", "score", "category_id")
# The types of each kind. Text is of any length.
KINDS = {"int": ("int32", "int64"), "float": ("float32", "float16"), "float32": ("float32",), "uint8": ("uint8",),
         "text": ("object",)}  # fmt: skip
# What one image may take in memory where its file is smaller than a quarter of it: zeros are compressed a thousandfold.
MAX_UNPACKED = 2**30
ATTRIBUTES = ("classes", "recipe", "provenance", "options", "complete")


@dataclass(frozen=True)
class Header:
    """What a store says about itself.

    Attributes:
        classes: the categories its detector knows, ``[{"id": int, "name": str}]``.
        recipe: the detector's recipe as text.
        provenance: `refdet.structures.provenance.Provenance` as JSON.
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
        features: feature name -> the shape of one region's, ``(1024,)`` or ``(2048, 7, 7)``.
        dtype: "float32" or "float16", of all features and maps.
        masks, ann_ids: whether there are masks and annotation ids.
        maps: names of the maps of whole images, ``()`` or ``("head",)``.
        compression: of features and maps: "none", "gzip" or "lzf".
    """

    features: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: str = "float32"
    masks: bool = False
    ann_ids: bool = False
    maps: tuple[str, ...] = ()
    compression: str = "none"

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression {self.compression!r} is none of {COMPRESSIONS}")
        if set(self.maps) - set(MAPS):
            raise ValueError(f"maps {self.maps}: a store holds {MAPS}")

    def is_compressed(self, dataset: str) -> bool:
        """Whether a dataset (by its whole name) is one of those that are compressed, if any are."""
        large = dataset.startswith("features/") or dataset in [f"maps/{name}" for name in self.maps]
        return large and self.compression != "none"

    def names(self) -> tuple[str, ...]:
        """The datasets that have a checksum for each image, and "images" for its row of ``/images``."""
        regions = [*REGION_COLUMNS] + ["ann_id"] * self.ann_ids + ["mask_start", "mask_counts"] * self.masks
        maps = [f"maps/{name}" for map_ in self.maps for name in (map_, f"{map_}_shape", "im_info")]
        return ("images", *(f"regions/{name}" for name in regions), *(f"features/{name}" for name in self.features),
                *maps)  # fmt: skip


class ImageRow(NamedTuple):
    """One image of a store to be written: what must be known of it before the regions are.

    ``map_shape`` is the (C, H, W) of its head map, zeros where it has none.
    """

    id: int
    file_name: str
    height: int
    width: int
    error: str
    regions: int
    mask_bytes: int
    map_shape: tuple[int, int, int] = (0, 0, 0)


def starts_of(counts: Sequence[int]) -> np.ndarray:
    """(n + 1,) int64: where each of n runs of these lengths starts, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64), dtype=np.int64)])


def image_checksum(image_id: int, height: int, width: int, first: int, last: int, file_name: str, error: str) -> int:
    """CRC-32 of an image's row of ``/images``: the fields as text, tabs between them; its regions are [first, last)."""
    text = f"{image_id}\t{height}\t{width}\t{first}\t{last}\t{file_name}\t{error}"
    return zlib.crc32(text.encode("utf-8", "surrogateescape"))


def attributes_checksum(attributes: Mapping[str, Any]) -> int:
    """CRC-32 of the schema, classes, recipe, provenance and options as they stand in the file, zeros between them."""
    texts = (str(attributes[name]) for name in ("schema", "classes", "recipe", "provenance", "options"))
    return zlib.crc32("\0".join(texts).encode("utf-8", "surrogateescape"))


def check_parts(path: Path, file: h5py.File) -> None:
    """InputError where a file is no store, is of another schema or lacks a part that every store has."""
    schema = file.attrs.get("schema")
    if not isinstance(schema, str) or schema != SCHEMA:
        found = "no schema" if schema is None else f"schema {schema!r:.60}"
        raise InputError(f"{path}: {found}, not {SCHEMA!r}; is it a file of refdet extract-features?")
    wanted = [f"images/{name}" for name in IMAGE_COLUMNS] + [f"regions/{name}" for name in REGION_COLUMNS]
    missing = [f"attribute {name}" for name in ATTRIBUTES if name not in file.attrs]
    missing += [name for name in [*wanted, "features"] if name not in file]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; extract it again")


def open_datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All datasets of a store that passed `check_parts`, by name: ``data["regions/box"]``.

    Raises:
        ValueError: one has a type or shape that no store has, or one is missing that another asks for.
    """
    images, regions = len(file["images/id"]), len(file["regions/box"])
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"images/{name}": (kind, (images + (name == "region_start"),)) for name, kind in IMAGE_COLUMNS.items()
    }
    shapes["regions/box"] = ("float32", (regions, 4))
    shapes["regions/score"], shapes["regions/category_id"] = ("float32", (regions,)), ("int", (regions,))
    if "ann_id" in file["regions"]:
        shapes["regions/ann_id"] = ("int", (regions,))
    if "mask_counts" in file["regions"] or "mask_start" in file["regions"]:
        shapes["regions/mask_counts"] = ("uint8", file["regions/mask_counts"].shape[:1])
        shapes["regions/mask_start"] = ("int", (regions + 1,))
    for name in file["features"]:
        shapes[f"features/{name}"] = ("float", (regions, *file[f"features/{name}"].shape[1:]))
    for name in MAPS:
        if f"maps/{name}" in file:
            shapes[f"maps/{name}"] = ("float", file[f"maps/{name}"].shape[:1])
            shapes[f"maps/{name}_start"] = ("int", (images + 1,))
            shapes[f"maps/{name}_shape"] = ("int", (images, 3))
            shapes["maps/im_info"] = ("float32", (images, 3))
    data = {name: file[name] for name in shapes}
    for name, (kind, shape) in shapes.items():
        if data[name].dtype not in KINDS[kind] or data[name].shape != shape:
            raise ValueError(f"{name} is {data[name].dtype} {data[name].shape}")
        if kind == "text" and h5py.check_string_dtype(data[name].dtype) is None:
            raise ValueError(f"{name} is no text")
    return data


def check_starts(name: str, starts: np.ndarray, end: int) -> None:
    """ValueError where offsets do not ascend from 0 to ``end``."""
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != end or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{name} does not ascend from 0 to {end}")


def parse_json(file: h5py.File, name: str, kind: type) -> Any:
    """An attribute that is JSON of a list or an object; ValueError where it is not."""
    value = json.loads(file.attrs[name])
    if not isinstance(value, kind):
        raise ValueError(f"attribute {name} is no JSON {'list' if kind is list else 'object'}")
    return value


def parse_classes(file: h5py.File) -> list[dict[str, Any]]:
    """The attribute ``classes``; ValueError where it is not ``[{"id": int, "name": str}]``."""
    classes: list[dict[str, Any]] = parse_json(file, "classes", list)
    for one in classes:
        number = one.get("id") if isinstance(one, dict) else None
        if type(number) is not int or not -(2**63) <= number < 2**63 or not isinstance(one.get("name"), str):
            raise ValueError("attribute classes is not a list of ids and names")
    return classes


def check_memory(data: Mapping[str, h5py.Dataset], starts: Mapping[str, np.ndarray], size: int) -> None:
    """ValueError where one image would take much more memory than its file has bytes.

    Args:
        data: datasets by name.
        starts: of the datasets whose rows are images' -> where each image's start.
        size: bytes of the file.
    """
    for name, of_images in starts.items():
        rows = int(np.diff(of_images).max(initial=0))
        need = rows * math.prod(data[name].shape[1:]) * data[name].dtype.itemsize
        if need > max(MAX_UNPACKED, 4 * size):
            raise ValueError(f"{name} of one image takes {need} bytes, and the file has {size}")
