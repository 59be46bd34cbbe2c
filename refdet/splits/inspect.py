"""Describe a split, checkpoint or store and its provenance."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from refdet.data.coco import CocoIndex
from refdet.data.instances_provenance import provenance_of_instances
from refdet.errors import InputError
from refdet.extraction.selection_record import recorded_provenance
from refdet.extraction.shard_folder import read_progress, shards_folder
from refdet.extraction.workers_file import read_workers
from refdet.files.file_kinds import HDF5_MAGIC, FileKind, kind_of, run_directory_near
from refdet.files.json_files import read_small_json
from refdet.files.short_text import agree, format_share
from refdet.files.strict_json import finite_json
from refdet.store import CORRUPTION_ERRORS
from refdet.store.hdf5_access import check_regular, open_store_file
from refdet.store.schema import CHECKSUMS, MAPS, parse_run
from refdet.store.verify import Verification, verify
from refdet.structures.limits import is_id
from refdet.structures.provenance import Provenance


def describe(path: str | Path) -> dict[str, Any]:
    """Describe an instances JSON, a run directory (or a file in one), a store, or the folder of an unfinished store.

    Args:
        path: the file or folder.

    Returns:
        A JSON object with "kind" ("split", "checkpoint", "store" or "unfinished store"), "path", the contents, and
        "provenance" (an object, or None where the file has none).

    Raises:
        InputError: the file does not exist, is none of these, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        plan = read_progress(path)
        return _describe_checkpoint(path) if plan is None else _describe_unfinished(path, plan)
    kind = kind_of(path)
    if kind is FileKind.MISSING:
        raise InputError(f"{path}: {_missing_message(path, 'file or folder')}")
    if kind in (FileKind.URL, FileKind.SPECIAL, FileKind.FORBIDDEN):
        raise InputError(f"{path}: {kind.value}")
    if path.name in ("model.json", "model.safetensors"):
        return _describe_checkpoint(path.parent)
    if kind is FileKind.STORE:
        return _describe_store(path)
    if kind is FileKind.JSON:
        return _describe_split(path)
    near = run_directory_near(path) if kind is FileKind.STATE else None
    hint = f"; give its run directory {near}" if near else ""
    raise InputError(f"{path}: {kind.value}, not an instances JSON, run directory or feature store{hint}")


def _describe_split(path: Path) -> dict[str, Any]:
    index = CocoIndex.load(path)
    annotations = [annotation for image_annotations in index.annotations.values() for annotation in image_annotations]
    return {
        "kind": "split",
        "path": str(path),
        "images": len(index.images),
        "images_without_annotations": sum(not image_annotations for image_annotations in index.annotations.values()),
        "annotations": len(index.raw["annotations"]),
        "crowds": sum(annotation.iscrowd for annotation in annotations),
        "without_segmentation": sum(annotation.segmentation is None for annotation in annotations),
        "categories": len(index.categories),
        "dropped": index.dropped,
        "provenance": provenance_of_instances(index).to_json(),
    }


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    weights = folder / "model.safetensors"
    for required in (folder / "model.json", weights):
        if not required.is_file():
            raise InputError(f"{folder}: no {required.name} in it; give a run directory of refdet train")
    model = read_small_json(folder / "model.json")
    if not isinstance(model, dict):
        raise InputError(f"{folder / 'model.json'}: not a JSON object; train or import the model again")
    try:
        with safe_open(weights, framework="numpy") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  # not a mapping
            dtypes = sorted({tensor.get_dtype() for tensor in slices})
            n_values = sum(math.prod(tensor.get_shape()) for tensor in slices)
            step = (file.metadata() or {}).get("step", "")
    except SafetensorError as error:
        raise InputError(f"{weights}: damaged ({error})") from None
    categories = model.get("categories")
    return {
        "kind": "checkpoint",
        "path": str(folder),
        # The weights' own step: a training run that is killed between writing its two files leaves an older model.json.
        "step": int(step) if step.isdecimal() and len(step) < 20 else model.get("step"),
        "recipe": model.get("recipe"),
        "categories": len(categories) if isinstance(categories, list | dict) else None,
        "tensors": len(slices),
        "numbers": n_values,
        "dtypes": dtypes,
        "untrained": model.get("untrained", []),
        "provenance": _provenance(folder / "model.json", model.get("provenance")),
    }


def _describe_store(path: Path) -> dict[str, Any]:
    try:
        with open_store_file(path) as file:
            images = file["images"]
            errors = [text for text in images["error"].asstr()[:] if text]
            classes = _attribute(path, file, "classes")
            return {
                "kind": "store",
                "path": str(path),
                "schema": str(file.attrs["schema"]),
                "complete": bool(file.attrs.get("complete", False)),
                "images": len(images["id"]),
                "images_with_errors": len(errors),
                "regions": len(file["regions/box"]),
                "masks": _count_masks(file),
                "ann_ids": "ann_id" in file["regions"],
                "features": {name: _describe_feature(data) for name, data in file.get("features", {}).items()},
                "maps": {name: str(file[f"maps/{name}"].dtype) for name in MAPS if f"maps/{name}" in file},
                "checksums": CHECKSUMS in file,
                "categories": len(classes) if isinstance(classes, list) else None,
                "options": _attribute(path, file, "options"),
                "run": _attribute(path, file, "run", partial(parse_run, path)),
                "provenance": _provenance(path, _attribute(path, file, "provenance")),
            }
    except CORRUPTION_ERRORS as error:
        raise InputError(f"{path}: damaged ({error})") from None


def _count_masks(file: h5py.File) -> int:
    """Number of regions with a mask: 0 for a detector without a mask branch, whose stores lack these columns."""
    if "mask_start" not in file["regions"]:
        return 0
    return int(np.count_nonzero(np.diff(file["regions/mask_start"][:])))


def _describe_unfinished(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    header = plan.get("header")
    header = header if isinstance(header, dict) else {}
    classes = header.get("classes")
    return {
        "kind": "unfinished store",
        "path": str(folder),
        "state": _state(plan),
        "shards": _count(plan, "shards"),
        "shards_finished": plan["finished"],
        "images": _count(plan, "images"),
        "batch_size": _count(plan, "batch_size"),
        "categories": len(classes) if isinstance(classes, list) else None,
        "options": plan.get("options"),
        "workers": read_workers(folder),
        "provenance": _provenance(folder / "plan.json", recorded_provenance(plan)),
    }


def _state(plan: dict[str, Any]) -> str:
    """How much of an extraction is finished, and how to finish it, for messages."""
    shards = _count(plan, "shards")
    finished = plan["finished"]
    if shards is None:
        done = f"{finished} of ? shards {agree(finished, 'is')} finished"
    else:
        done = f"{format_share(finished, shards, 'shard', 'is')} finished"
    return f"{done}; finish it with the same refdet extract-features command and --resume"


def _count(plan: dict[str, Any], name: str) -> int | None:
    """A count in an extraction's plan, None if it is missing or invalid."""
    value = plan.get(name)
    return value if type(value) is int and is_id(value) else None


def _missing_message(path: Path, what: str) -> str:
    """Error message for a missing path."""
    folder = shards_folder(path)
    plan = read_progress(folder) if folder.is_dir() else None
    return f"no such {what}" if plan is None else f"not finished yet: in {folder}, {_state(plan)}"


def _describe_feature(data: h5py.Dataset) -> dict[str, Any]:
    """Describe a feature: vector width or map shape, dtype, and compression if it has one."""
    shape = {"width": data.shape[1]} if data.ndim == 2 else {"shape": list(data.shape[1:])}
    return {**shape, "dtype": str(data.dtype), **({"compression": data.compression} if data.compression else {})}


def check(path: str | Path) -> Verification:
    """Verify a whole store.

    Args:
        path: the store.

    Returns:
        The result of `refdet.store.verify.verify`.

    Raises:
        InputError: the file does not exist or is not HDF5.
    """
    path = Path(path)
    if path.is_dir():
        plan = read_progress(path)
        what = "a folder; only a file written by refdet extract-features can be verified"
        raise InputError(f"{path}: {what if plan is None else f'an unfinished store: {_state(plan)}'}")
    if not path.exists():
        raise InputError(f"{path}: {_missing_message(path, 'file')}")
    check_regular(path)
    with path.open("rb") as file:
        if file.read(len(HDF5_MAGIC)) != HDF5_MAGIC:
            raise InputError(
                f"{path}: not a feature store; only a file written by refdet extract-features can be verified"
            )
    return verify(path)


def _attribute(path: Path, file: h5py.File, name: str, parse: Callable[[str | bytes], Any] = finite_json) -> Any:
    """Parse an attribute of a store that holds JSON; None if it is missing."""
    text = file.attrs.get(name)
    if text is None:
        return None
    try:
        return parse(text)
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{path}: damaged: attribute {name!r} is not JSON") from None


def _provenance(path: Path, value: Any) -> dict[str, Any] | None:
    """Check the JSON of a provenance; None if it is missing."""
    if not value:
        return None
    try:
        return Provenance.from_json(value).to_json()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
