"""Finding, reading and checking the files below a REFER data root.

ROOT/DATASET/refs(SPLIT_BY).p        a pickled list of refs
ROOT/DATASET/grefs(SPLIT_BY).json    gRefCOCO: the same as JSON; a ref may have no or several annotations
ROOT/DATASET/instances.json          the COCO annotations the refs point to
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
from .validation import Kinds, check_fields, check_ids, check_refs

_REFS_FILE = re.compile(r"(refs\((?P<split_by>[^()]+)\)\.p)|(grefs\((?P<generalized>[^()]+)\)\.(p|json))")


def available(root: str | Path) -> list[tuple[str, str]]:
    """The (dataset, split_by) pairs found under a data root, sorted; [] if there are none.

    Raises:
        ReferNotFoundError: the root is no folder.
        ReferDataError: a folder cannot be read, or holds two files for one pair.
    """
    found = _find(Path(root))
    for files in found.values():
        _only(files)
    return sorted(found)


def read_refs(root: str | Path, dataset: str, split_by: str) -> list[Ref]:
    """The checked refs of one dataset and split_by, in the order of the file.

    ``ann_id`` and ``category_id`` are lists in gRefCOCO's files, [-1] where a ref has no target (`target_ids`).

    Raises:
        ReferNotFoundError: there is no such dataset or split_by; the message lists what there is, and for a
            published dataset says how to get it.
        ReferDataError: the file is damaged, a field is missing or of the wrong type, a ref id is there twice, or
            there are two such files.
    """
    path = refs_file(root, dataset, split_by)
    with no_garbage_collection():
        refs = read_plain_pickle(path) if path.suffix == ".p" else read_json(path)
        generalized = is_generalized(path)
        if generalized and isinstance(refs, list):
            refs = [_with_lists(ref) for ref in refs]
        check_refs(path, refs, generalized, _ann_id(dataset))
    return refs


def refs_file(root: str | Path, dataset: str, split_by: str) -> Path:
    """The file of the refs of one dataset and split_by; errors as of `read_refs`."""
    root = Path(root)
    if not root.is_dir():
        hint = how_to_get(root, dataset, split_by)
        raise ReferNotFoundError(f"{root}: no such folder of REFER data{'; ' * bool(hint)}{hint}")
    found = _find(root)
    if (dataset, split_by) not in found:
        raise ReferNotFoundError(_not_there(root, dataset, split_by, sorted(found)))
    return _only(found[dataset, split_by])


def is_generalized(path: Path) -> bool:
    """Whether the refs of a file may have no or several targets."""
    return path.name.startswith("grefs")


def read_instances(root: str | Path, dataset: str) -> Instances:
    """The checked ``instances.json`` of one dataset.

    Raises:
        ReferNotFoundError: there is no such file.
        ReferDataError: it is malformed (the line is named), or an image, annotation or category has no
            integer id or one that is there twice; RefClef's annotation ids may also be strings.
    """
    path = Path(root) / dataset / "instances.json"
    with no_garbage_collection():
        try:
            instances = read_json(path)
        except ReferNotFoundError:
            raise ReferNotFoundError(f"{path}: no such file; it comes in one archive with the refs") from None
        if not isinstance(instances, dict):
            raise ReferDataError(f"{path}: holds a {type(instances).__name__}, not a COCO instances object")
        fields: dict[str, dict[str, Kinds]] = {
            "images": {"id": int},
            "annotations": {"id": _ann_id(dataset), "image_id": int},
            "categories": {"id": int, "name": str},
        }
        for key, wanted in fields.items():
            if not isinstance(instances.get(key), list):
                raise ReferDataError(f"{path}: no list {key!r} in it")
            check_fields(path, f"{key}[{{}}]", instances[key], wanted)
            check_ids(path, f"{key}: id", [entry["id"] for entry in instances[key]])
    return Instances(
        images=instances["images"], annotations=instances["annotations"], categories=instances["categories"]
    )


def _ann_id(dataset: str) -> Kinds:
    """Of what type the annotation ids of a dataset are: RefClef's are of image and region, "8_1"."""
    return (int, str) if dataset == "refclef" else int


def _only(files: list[Path]) -> Path:
    """The one file; ReferDataError if there are several, of which all but one would be overlooked."""
    if len(files) > 1:
        folder, names = files[0].parent, " and ".join(sorted((file.name for file in files), reverse=True))
        mend = "keep one of them" if all(map(is_generalized, files)) else "put gRefCOCO into a folder of its own"
        raise ReferDataError(f"{folder}: holds {names}; {mend}")
    return files[0]


def _find(root: Path) -> dict[tuple[str, str], list[Path]]:
    if not root.is_dir():
        raise ReferNotFoundError(f"{root}: no such folder of REFER data")
    found: dict[tuple[str, str], list[Path]] = {}
    try:
        files = [file for folder in root.iterdir() if folder.is_dir() for file in folder.iterdir()]
        for file in files:
            match = _REFS_FILE.fullmatch(file.name)
            split_by = match and (match["split_by"] or match["generalized"])
            # A name that cannot be printed could not be named in an error or in a report either.
            if split_by and file.is_file() and f"{file.parent.name}{split_by}".isprintable():
                found.setdefault((file.parent.name, split_by), []).append(file)
    except OSError as error:
        raise ReferDataError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from None
    return found


def _with_lists(ref: Any) -> Any:
    """The ref with lists in the fields that gRefCOCO may hold as a single number, and one way to say "none"."""
    if not isinstance(ref, dict):
        return ref
    lists = {key: [ref[key]] if type(ref[key]) is int else ref[key] for key in ("ann_id", "category_id") if key in ref}
    return ref | {key: value if value != [] else [NO_TARGET] for key, value in lists.items()}


def _not_there(root: Path, dataset: str, split_by: str, pairs: list[tuple[str, str]]) -> str:
    if any(_REFS_FILE.fullmatch(file.name) for file in root.iterdir()):
        return f"{root}: this is the folder of one dataset; give the folder above it"
    hint = how_to_get(root, dataset, split_by)
    hint = f"; {hint}" if hint else ""
    if not pairs:
        return f"{root}: no DATASET/refs(SPLIT_BY).p below it; is it the folder of the REFER data?{hint[1:]}"
    split_bys = [by for name, by in pairs if name == dataset]
    if split_bys:
        return f"{root / dataset}: no refs({split_by}).p; there is split_by {', '.join(split_bys)}{hint}"
    names = sorted({name for name, _ in pairs})
    return f"{root}: no dataset {dataset!r}; there is {', '.join(names)}{hint}"
