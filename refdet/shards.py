"""Extraction in progress: the folder ``F.h5.parts`` of finished shards, and their merging into ``F.h5``.

A shard holds the regions of some images as an uncompressed .npz and is whole or absent, so work that was
stopped at any moment goes on from its last shard. ``plan.json`` says what is being computed; a folder made
under another plan is refused. No torch.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store
from refdet.atomic import atomic_path, full_disk, write_json
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, WorkError
from refdet.regions import Regions
from refdet.store import Columns, Header, ImageRow

_SHARD = re.compile(r"\d{6}\.npz")
_LOCK = "lock"


@dataclass(frozen=True)
class Plan:
    """What is being computed: all that decides the contents of the store.

    Attributes:
        options: names and values as they are kept in the store; two extractions with equal options give the
            same file.
        features, dtype, masks, ann_ids: the columns, see `refdet.store.Columns`.
    """

    options: dict[str, Any]
    features: tuple[str, ...]
    dtype: str
    masks: bool
    ann_ids: bool

    def differences(self, other: dict[str, Any]) -> str:
        """What differs from another plan's options, for people; "" where nothing does."""
        told = []
        mine = json.loads(json.dumps(self.options))  # tuples become lists, as they did on disk
        for name in [*mine, *(key for key in other if key not in mine)]:
            old, new = other.get(name), mine.get(name)
            if old == new:
                continue
            if name.endswith("_sha256"):
                told.append(f"another {name.removesuffix('_sha256').replace('_', ' ')}")
            else:
                told.append(f"--{name.replace('_', '-')} was {_shown(old)} and is now {_shown(new)}")
        return "; ".join(told)


class Parts:
    """The shards of one extraction; made by `begin`.

    Attributes:
        done: ids of the images that finished shards hold.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out = out
        self.folder = parts_folder(out)
        self.plan = plan
        self._mend = "what is finished is kept: free some space, then continue with --resume"
        self.done: set[int] = set()
        for shard in self._shards():
            with _reading(shard) as arrays:
                self.done.update(int(i) for i in arrays["id"])

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if _SHARD.fullmatch(path.name))

    def write(self, regions: Sequence[Regions]) -> None:
        """Add one shard. WorkError where the disk is full; then nothing of it stays behind."""
        shards = self._shards()
        number = int(shards[-1].stem) + 1 if shards else 0
        path = self.folder / f"{number:06d}.npz"
        arrays = _to_arrays(regions, self.plan)
        with full_disk(path, self._mend), atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        self.done.update(r.image_id for r in regions)

    def merge(self, records: Sequence[ImageRecord], header: Header) -> None:
        """Write the store with its images in the order of ``records``, then remove the folder.

        Memory holds one shard at a time. WorkError where the disk is full; the shards stay.
        """
        rows: dict[int, ImageRow] = {}
        widths: dict[str, int] = dict.fromkeys(self.plan.features, 0)
        for shard in self._shards():
            with _reading(shard) as arrays:
                rows.update((row.id, row) for row in _image_rows(arrays))
                for name, known in widths.items():
                    width = int(arrays[f"features/{name}"].shape[1])  # 0 where no image has regions
                    if width and known not in (0, width):
                        raise WorkError(f"{shard}: {name} is {width} wide, {known} elsewhere; remove this shard")
                    widths[name] = known or width
        columns = Columns(widths, self.plan.dtype, self.plan.masks, self.plan.ann_ids)
        images = [rows[record.id] for record in records]
        self._check_space(images, columns)
        with full_disk(self.out, self._mend), store.create(self.out, header, columns, images) as writer:
            for shard in self._shards():
                for regions in _from_shard(shard, self.plan):
                    writer.put(regions)
        shutil.rmtree(self.folder)

    def _check_space(self, images: Sequence[ImageRow], columns: Columns) -> None:
        # HDF5 does not take a full disk well; what the store needs is known to the byte but for its tables.
        item = np.dtype(columns.dtype).itemsize
        per_region = 16 + 4 + 8 + 8 * columns.ann_ids + 8 * columns.masks + item * sum(columns.features.values())
        need = sum(row.regions * per_region + row.mask_bytes for row in images)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            told = f"the store needs {need / 2**20:.0f} MiB and {free / 2**20:.0f} are free"
            raise WorkError(f"{self.out}: no space left on the disk: {told}; {self._mend}")


def parts_folder(out: Path) -> Path:
    """Where the finished shards of ``out`` are until it is complete."""
    return out.with_name(out.name + ".parts")


@contextmanager
def begin(out: Path, plan: Plan, resume: bool) -> Iterator[Parts | None]:
    """Start or continue an extraction; one process at a time.

    Gives None where ``out`` is there already and complete under this plan.

    Raises:
        InputError: ``out`` or its shards exist and ``resume`` is False; they were made under another plan; another
            process is writing them.
        WorkError: the disk is full.
    """
    folder = parts_folder(out)
    if out.exists():
        if not resume:
            raise InputError(f"{out} exists; choose another --out or remove it")
        with store.open(out) as finished:
            differences = plan.differences(finished.options)
        if differences:
            raise InputError(f"{out} is complete but made otherwise: {differences}; choose another --out")
        shutil.rmtree(folder, ignore_errors=True)  # merged, but stopped before it was removed
        yield None
        return
    plan_file = folder / "plan.json"
    if plan_file.exists():
        if not resume:
            raise InputError(f"{folder} holds an unfinished extraction; add --resume to continue, or remove it")
        differences = plan.differences(_read_plan(plan_file))
        if differences:
            raise InputError(f"{folder} was begun otherwise: {differences}; use the same options, or remove it")
    with full_disk(folder, "free some space and run it again"):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            half_written = [*folder.glob(".*"), *out.parent.glob(f".{glob.escape(out.stem)}.????????{out.suffix}")]
            for path in half_written:  # when a process was killed; names as `atomic_path` makes them
                path.unlink()
            if not plan_file.exists():
                write_json(plan_file, plan.options)
            yield Parts(out, plan)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing it; let it end or choose another --out") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); remove {path.parent} and start again") from None
    return value if isinstance(value, dict) else {}


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _to_arrays(regions: Sequence[Regions], plan: Plan) -> dict[str, np.ndarray]:
    """The regions of some images as flat arrays, as `_from_shard` reads them."""
    full = [r for r in regions if len(r)]
    masks = [mask for r in full for mask in (r.masks or ())] if plan.masks else []
    arrays = {
        "id": np.array([r.image_id for r in regions], np.int64),
        "file_name": np.array([r.file_name for r in regions], np.str_),
        "height": np.array([r.height for r in regions], np.int64),
        "width": np.array([r.width for r in regions], np.int64),
        "error": np.array([r.error for r in regions], np.str_),
        "count": np.array([len(r) for r in regions], np.int64),
        "box": _stack([r.boxes for r in full], (0, 4), "float32"),
        "score": _stack([r.scores for r in full], (0,), "float32"),
        "category_id": _stack([r.category_ids for r in full], (0,), "int64"),
        "mask_counts": np.frombuffer(b"".join(masks), np.uint8),
        "mask_length": np.array([len(mask) for mask in masks], np.int64),
    }
    if plan.masks and len(masks) != len(arrays["score"]):
        raise ValueError("regions without masks in a plan with masks")
    if plan.ann_ids:
        arrays["ann_id"] = _stack([r.ann_ids for r in full if r.ann_ids is not None], (0,), "int64")
    for name in plan.features:
        # An image without regions may still know its width.
        known = [r.features[name] for r in regions if name in r.features]
        width = known[0].shape[1] if known else 0
        arrays[f"features/{name}"] = _stack([r.features[name] for r in full], (0, width), plan.dtype)
    return arrays


def _stack(parts: Sequence[np.ndarray], empty: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(empty, dtype)


@contextmanager
def _reading(shard: Path) -> Iterator[Any]:
    try:
        with np.load(shard, allow_pickle=False) as arrays:
            yield arrays
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WorkError(f"{shard}: damaged ({error}); remove this file and continue with --resume") from None


def _image_rows(arrays: Any) -> Iterator[ImageRow]:
    """What the store must know of each image before it is written."""
    counts, lengths = arrays["count"], arrays["mask_length"]
    starts = np.concatenate([[0], np.cumsum(counts)])
    sums = np.concatenate([[0], np.cumsum(lengths)])
    columns = (arrays[name].tolist() for name in ("id", "file_name", "height", "width", "error"))
    for i, (image_id, name, height, width, error) in enumerate(zip(*columns, strict=True)):
        mask_bytes = int(sums[starts[i + 1]] - sums[starts[i]]) if len(lengths) else 0
        yield ImageRow(image_id, name, height, width, error, int(counts[i]), mask_bytes)


def _from_shard(shard: Path, plan: Plan) -> Iterator[Regions]:
    with _reading(shard) as arrays:
        images = list(_image_rows(arrays))
        loaded = {name: arrays[name] for name in ("box", "score", "category_id", "mask_length", "mask_counts")}
        ann_ids = arrays["ann_id"] if plan.ann_ids else None
        features = {name: arrays[f"features/{name}"] for name in plan.features}
    first, byte = 0, 0
    text = loaded["mask_counts"].tobytes()
    for image in images:
        rows = slice(first, first + image.regions)
        masks = []
        for length in loaded["mask_length"][rows].tolist():
            masks.append(text[byte : byte + length])
            byte += length
        yield Regions(
            image.id, image.file_name, image.height, image.width,
            boxes=loaded["box"][rows],
            scores=loaded["score"][rows],
            category_ids=loaded["category_id"][rows],
            ann_ids=None if ann_ids is None else ann_ids[rows],
            masks=tuple(masks) if plan.masks else None,
            features={name: values[rows] for name, values in features.items()},
            error=image.error,
        )  # fmt: skip
        first += image.regions
