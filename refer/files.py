"""Find, read and check the files below a REFER data root.

ROOT/DATASET/refs(SPLIT_BY).p        pickled list of refs
ROOT/DATASET/grefs(SPLIT_BY).json    gRefCOCO: the same as JSON (or .p), where a ref has any number of annotations
ROOT/DATASET/instances.json          COCO annotations that the refs refer to
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import ReferDataError, ReferNotFoundError
from .plain_files import no_garbage_collection, read_json
from .safe_pickle import read_plain_pickle
from .statistics import how_to_get
from .types import NO_TARGET, Instances, Ref
from .validation import Types, check_fields, check_ids, check_refs

_REFS_FILE = re.compile(r"(refs\((?P<split_by>[^()]+)\)\.p)|(grefs\((?P<generalized>[^()]+)\)\.(p|json))")


def available(root: str | Path) -> list[tuple[str, str]]:
    """List the datasets below a data root.

    Args:
        root: folder with the REFER datasets.

    Returns:
        Sorted (dataset, split_by) pairs.

    Raises:
        ReferNotFoundError: the root is not a folder.
        ReferDataError: a folder cannot be read, or has two files for the same pair.
    """
    files_by_pair = _find_refs_files(Path(root))
    for files in files_by_pair.values():
        _single_file(files)
    return sorted(files_by_pair)


def read_refs(root: str | Path, dataset: str, split_by: str) -> list[Ref]:
    """Read and check the refs of a dataset and split_by.

    Args:
        root: folder with the REFER datasets.
        dataset: such as "refcoco".
        split_by: such as "unc".

    Returns:
        The refs in file order. In gRefCOCO, ``ann_id`` and ``category_id`` are lists, [-1] for a ref without target.

    Raises:
        ReferNotFoundError: no such dataset or split_by; the message lists the existing ones, and how to get a
            published dataset.
        ReferDataError: a damaged file, a missing field or one of the wrong type, a duplicate ref id, or two files.
    """
    path = refs_file(root, dataset, split_by)
    with no_garbage_collection():
        refs = read_plain_pickle(path) if path.suffix == ".p" else read_json(path)
        generalized = is_generalized(path)
        if generalized and isinstance(refs, list):
            refs = [_with_lists(ref) for ref in refs]
        check_refs(path, refs, generalized, _ann_id_type(dataset))
    return refs


def refs_file(root: str | Path, dataset: str, split_by: str) -> Path:
    """Find the refs file of a dataset and split_by; raises the errors of `read_refs`."""
    root = Path(root)
    if not root.is_dir():
        hint = how_to_get(root, dataset, split_by)
        raise ReferNotFoundError(f"{root}: no such folder; {hint}" if hint else f"{root}: no such folder")
    files_by_pair = _find_refs_files(root)
    if (dataset, split_by) not in files_by_pair:
        raise ReferNotFoundError(_not_found_message(root, dataset, split_by, sorted(files_by_pair)))
    return _single_file(files_by_pair[dataset, split_by])


def is_generalized(path: Path) -> bool:
    """Whether the refs in a file may have any number of targets."""
    return path.name.startswith("grefs")


def read_instances(root: str | Path, dataset: str) -> Instances:
    """Read and check the ``instances.json`` of a dataset.

    Args:
        root: folder with the REFER datasets.
        dataset: such as "refcoco".

    Returns:
        Its images, annotations and categories.

    Raises:
        ReferNotFoundError: the file does not exist.
        ReferDataError: malformed JSON (with the line), or an image, annotation or category with a missing, invalid or
            duplicate id. RefClef's annotation ids may be strings.
    """
    path = Path(root) / dataset / "instances.json"
    with no_garbage_collection():
        try:
            instances = read_json(path)
        except ReferNotFoundError:
            raise ReferNotFoundError(
                f"{path}: no such file; extract it from the archive of the refs, or get both with refdet fetch-data"
            ) from None
        if not isinstance(instances, dict):
            raise ReferDataError(
                f"{path}: contains a {type(instances).__name__}, not an object; give a COCO instances file"
            )
        fields: dict[str, dict[str, Types]] = {
            "images": {"id": int},
            "annotations": {"id": _ann_id_type(dataset), "image_id": int},
            "categories": {"id": int, "name": str},
        }
        for key, required in fields.items():
            if not isinstance(instances.get(key), list):
                raise ReferDataError(f"{path}: no list {key!r} in it; give a COCO instances file")
            check_fields(path, f"{key}[{{}}]", instances[key], required)
            check_ids(path, f"{key}: id", [entry["id"] for entry in instances[key]])
    return Instances(
        images=instances["images"], annotations=instances["annotations"], categories=instances["categories"]
    )


def _ann_id_type(dataset: str) -> Types:
    """Type of a dataset's annotation ids; RefClef's consist of image and region, such as "8_1"."""
    return (int, str) if dataset == "refclef" else int


def _single_file(files: list[Path]) -> Path:
    """Return the only file; raises ReferDataError if there are several, as the others would be ignored."""
    if len(files) > 1:
        folder, names = files[0].parent, " and ".join(sorted((file.name for file in files), reverse=True))
        fix = "keep one of them" if all(map(is_generalized, files)) else "move gRefCOCO to its own folder"
        raise ReferDataError(f"{folder}: contains {names}; {fix}")
    return files[0]


def _find_refs_files(root: Path) -> dict[tuple[str, str], list[Path]]:
    """Refs files by (dataset, split_by); raises the errors of `available`."""
    if not root.is_dir():
        raise ReferNotFoundError(
            f"{root}: no such folder; give the REFER data folder, or get it with refdet fetch-data"
        )
    files_by_pair: dict[tuple[str, str], list[Path]] = {}
    try:
        files = [file for folder in root.iterdir() if folder.is_dir() for file in folder.iterdir()]
        for file in files:
            match = _REFS_FILE.fullmatch(file.name)
            split_by = match and (match["split_by"] or match["generalized"])
            # Unprintable names are ignored, as they cannot be shown in messages and reports.
            if split_by and file.is_file() and f"{file.parent.name}{split_by}".isprintable():
                files_by_pair.setdefault((file.parent.name, split_by), []).append(file)
    except OSError as error:
        raise ReferDataError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from None
    return files_by_pair


def _with_lists(ref: Any) -> Any:
    """Convert single numbers of gRefCOCO's list fields to lists, and empty lists to [-1]."""
    if not isinstance(ref, dict):
        return ref
    lists = {key: [ref[key]] if type(ref[key]) is int else ref[key] for key in ("ann_id", "category_id") if key in ref}
    return ref | {key: value if value != [] else [NO_TARGET] for key, value in lists.items()}


def _not_found_message(root: Path, dataset: str, split_by: str, pairs: list[tuple[str, str]]) -> str:
    """Error message for a dataset and split_by that is not among the existing ``pairs``."""
    if any(_REFS_FILE.fullmatch(file.name) for file in root.iterdir()):
        return f"{root}: the folder of a single dataset; give the folder above it"
    hint = how_to_get(root, dataset, split_by)
    hint = f"; {hint}" if hint else ""
    if not pairs:
        return f"{root}: no DATASET/refs(SPLIT_BY).p found; give the REFER data folder{hint}"
    split_bys = [by for name, by in pairs if name == dataset]
    if split_bys:
        return f"{root / dataset}: no refs({split_by}).p; choose split_by {', '.join(split_bys)}{hint}"
    names = sorted({name for name, _ in pairs})
    return f"{root}: no dataset {dataset!r}; choose from {', '.join(names)}{hint}"
