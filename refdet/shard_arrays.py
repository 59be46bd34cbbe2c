"""One shard on disk: the regions of some images, one image after the other, and a checksum of it all. No torch.

    "refdet-shard/1\\n"
    u32 length, JSON      the shard's mark: which shard of which plan it is
    u32 length, JSON      of each image: its fields, the length of each mask, and name, dtype and shape of each array;
    bytes                 then the masks back to back, then the arrays in that order
    u32 0                 the end of the images
    u32 CRC-32            of all that stands before it

Numbers are little-endian. Images are written as they come and read one by one, so memory holds one of them however
large its features are. The CRC-32 is for accidents: it finds a cut, a hole and a flipped bit at the speed of memory.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refdet.regions import Regions
from refdet.shard_plan import Plan

_MAGIC = b"refdet-shard/1\n"
_NUMBER = struct.Struct("<I")
_BLOCK = 1 << 20
_FEATURE, _MAP = "features/", "maps/"


class ShardError(Exception):
    """A shard is not what was written; the message says what is wrong with it, without its name."""


class ShardWriter:
    """Writes the images of one shard to a file opened for it.

    Arguments:
        mark: which shard this is; JSON. `read` wants the same.
        plan: says what is kept of the regions.
    """

    def __init__(self, file: BinaryIO, mark: Mapping[str, Any], plan: Plan) -> None:
        self._file, self._plan = file, plan
        self._crc = 0
        self._write(_MAGIC)
        self._head(mark)

    def add(self, regions: Regions) -> None:
        """Write one image. ValueError where a column is missing that is to be kept."""
        masks = regions.masks or () if self._plan.masks else ()
        if self._plan.masks and len(masks) != len(regions):
            raise ValueError(f"image {regions.image_id}: regions without masks where masks are kept")
        arrays = _arrays(regions, self._plan)
        self._head({
            "id": regions.image_id, "file_name": regions.file_name,
            "height": regions.height, "width": regions.width, "error": regions.error,
            "masks": [len(mask) for mask in masks],
            "arrays": [[name, values.dtype.str, values.shape] for name, values in arrays.items()],
        })  # fmt: skip
        self._write(b"".join(masks))
        for values in arrays.values():
            if values.size:
                self._write(values.reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Write the end and the checksum."""
        self._write(_NUMBER.pack(0))
        self._file.write(_NUMBER.pack(self._crc))

    def _head(self, value: Mapping[str, Any]) -> None:
        text = json.dumps(value).encode()
        self._write(_NUMBER.pack(len(text)) + text)

    def _write(self, data: bytes | memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)


def read(path: Path, mark: Mapping[str, Any], plan: Plan) -> Iterator[Regions]:
    """The images of a shard, in the order they were added; the whole file is checked before the first.

    Raises:
        ShardError: it is cut or damaged, or is another shard.
    """
    with path.open("rb") as file:
        _check(file)
        file.seek(len(_MAGIC))
        if _read_head(file) != mark:
            raise ShardError("it is of another extraction")
        while (head := _read_head(file)) is not None:
            text = file.read(sum(head["masks"]))
            ends = np.cumsum([0, *head["masks"]]).tolist()
            masks = tuple(text[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True))
            arrays = {name: _read_array(file, np.dtype(dtype), shape) for name, dtype, shape in head["arrays"]}
            yield _regions(head, masks if plan.masks else None, arrays)


def _check(file: BinaryIO) -> None:
    size = file.seek(0, 2)
    file.seek(0)
    if size < len(_MAGIC) + 2 * _NUMBER.size or file.read(len(_MAGIC)) != _MAGIC:
        raise ShardError("damaged: it is no shard" if size else "damaged: it is empty")
    crc, left = zlib.crc32(_MAGIC), size - len(_MAGIC) - _NUMBER.size
    while left:
        block = file.read(min(_BLOCK, left))
        if not block:
            raise ShardError("damaged: it is cut")
        crc, left = zlib.crc32(block, crc), left - len(block)
    if file.read(_NUMBER.size) != _NUMBER.pack(crc):
        raise ShardError("damaged: its checksum does not fit")


def _read_head(file: BinaryIO) -> Any:
    (length,) = _NUMBER.unpack(file.read(_NUMBER.size))
    return json.loads(file.read(length)) if length else None


def _read_array(file: BinaryIO, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(file.read(count * dtype.itemsize), dtype).reshape(shape)


def _arrays(regions: Regions, plan: Plan) -> dict[str, np.ndarray]:
    """What is kept of an image's regions, as it is kept; with `_regions` the only place that knows the columns."""
    arrays = {
        "box": np.ascontiguousarray(regions.boxes, "<f4"),
        "score": np.ascontiguousarray(regions.scores, "<f4"),
        "category_id": np.ascontiguousarray(regions.category_ids, "<i8"),
    }
    if plan.ann_ids and len(regions):
        if regions.ann_ids is None:
            raise ValueError(f"image {regions.image_id}: regions without annotation ids where they are kept")
        arrays["ann_id"] = np.ascontiguousarray(regions.ann_ids, "<i8")
    for name in plan.features:
        if len(regions) and name not in regions.features:
            raise ValueError(f"image {regions.image_id}: regions without {name}")
        if name in regions.features:  # an image without regions may still know the shape of its features
            arrays[_FEATURE + name] = np.ascontiguousarray(regions.features[name], plan.dtype)
    for name in plan.maps:
        if name not in regions.maps and not regions.error:
            raise ValueError(f"image {regions.image_id}: no {name} map")
        if name in regions.maps:
            arrays[_MAP + name] = np.ascontiguousarray(regions.maps[name], plan.dtype)
            arrays["im_info"] = np.ascontiguousarray(regions.im_info, "<f4")
    return arrays


def _regions(head: Mapping[str, Any], masks: tuple[bytes, ...] | None, arrays: Mapping[str, np.ndarray]) -> Regions:
    return Regions(
        head["id"], head["file_name"], head["height"], head["width"],
        boxes=arrays["box"],
        scores=arrays["score"],
        category_ids=arrays["category_id"],
        ann_ids=arrays.get("ann_id"),
        masks=masks,
        features=_named(_FEATURE, arrays),
        error=head["error"],
        maps=_named(_MAP, arrays),
        im_info=arrays.get("im_info"),
    )  # fmt: skip


def _named(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
