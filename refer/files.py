"""Finding, reading and checking the files below a REFER data root.

ROOT/DATASET/refs(SPLIT_BY).p      a pickled list of refs
ROOT/DATASET/instances.json        the COCO annotations the refs point to
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import ReferDataError, ReferNotFoundError
from .records import Instances, Ref
from .unpickle import read_plain_pickle

_REFS_FILE = re.compile(r"refs\((?P<split_by>[^()]+)\)\.p")
_REF_FIELDS: dict[str, type] = {
    "ref_id": int, "ann_id": int, "category_id": int, "image_id": int, "split": str, "sentences": list
}  # fmt: skip
_SENTENCE_FIELDS: dict[str, type] = {"sent_id": int, "sent": str, "tokens": list}


def available(root: str | Path) -> list[tuple[str, str]]:
    """The (dataset, split_by) pairs found under a data root, sorted; [] if there are none.

    Raises:
        ReferNotFoundError: the root is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ReferNotFoundError(f"{root}: no such folder of REFER data")
    found = []
    for folder in root.iterdir():
        if folder.is_dir():
            matches = (_REFS_FILE.fullmatch(file.name) for file in folder.iterdir() if file.is_file())
            found += [(folder.name, match["split_by"]) for match in matches if match]
    return sorted(found)


def read_refs(root: str | Path, dataset: str, split_by: str) -> list[Ref]:
    """The checked refs of one dataset and split_by, in the order of the file.

    Raises:
        ReferNotFoundError: there is no such dataset or split_by; the message lists what there is.
        ReferDataError: the file is damaged, a field is missing or of the wrong type, or a ref id is there
            twice.
    """
    root = Path(root)
    pairs = available(root)
    if (dataset, split_by) not in pairs:
        raise ReferNotFoundError(_not_there(root, dataset, split_by, pairs))
    path = root / dataset / f"refs({split_by}).p"
    refs = read_plain_pickle(path)
    if not isinstance(refs, list):
        raise ReferDataError(f"{path}: holds a {type(refs).__name__}, not a list of refs")
    seen: set[int] = set()
    for position, ref in enumerate(refs):
        _check(path, f"ref number {position}", ref, _REF_FIELDS)
        ref_id = ref["ref_id"]
        if ref_id in seen:
            raise ReferDataError(f"{path}: ref_id {ref_id} is there twice")
        seen.add(ref_id)
        for sentence in ref["sentences"]:
            _check(path, f"a sentence of ref {ref_id}", sentence, _SENTENCE_FIELDS)
    return refs


def read_instances(root: str | Path, dataset: str) -> Instances:
    """The checked ``instances.json`` of one dataset.

    Raises:
        ReferNotFoundError: there is no such file.
        ReferDataError: it is malformed (the line is named), or an image, annotation or category has no
            integer id or one that is there twice.
    """
    path = Path(root) / dataset / "instances.json"
    try:
        instances = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ReferNotFoundError(f"{path}: no such file; it comes with the refs of {dataset}") from None
    except json.JSONDecodeError as error:
        raise ReferDataError(f"{path}: malformed JSON in line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ReferDataError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(instances, dict):
        raise ReferDataError(f"{path}: holds a {type(instances).__name__}, not a COCO instances object")
    fields: dict[str, dict[str, type]] = {
        "images": {"id": int},
        "annotations": {"id": int, "image_id": int},
        "categories": {"id": int, "name": str},
    }
    for key, wanted in fields.items():
        if not isinstance(instances.get(key), list):
            raise ReferDataError(f"{path}: no list {key!r} in it")
        seen: set[int] = set()
        for position, entry in enumerate(instances[key]):
            _check(path, f"{key}[{position}]", entry, wanted)
            if entry["id"] in seen:
                raise ReferDataError(f"{path}: {key}: id {entry['id']} is there twice")
            seen.add(entry["id"])
    return Instances(
        images=instances["images"], annotations=instances["annotations"], categories=instances["categories"]
    )


def _check(path: Path, what: str, entry: Any, wanted: dict[str, type]) -> None:
    if not isinstance(entry, dict):
        raise ReferDataError(f"{path}: {what} is a {type(entry).__name__}, not a dictionary")
    for key, kind in wanted.items():
        value = entry.get(key)
        if type(value) is not kind:  # True is an int to isinstance
            shown = f"is {value!r:.40}" if key in entry else "is missing"
            raise ReferDataError(f"{path}: {what}: {key!r} {shown}, it must be of type {kind.__name__}")


def _not_there(root: Path, dataset: str, split_by: str, pairs: list[tuple[str, str]]) -> str:
    if any(_REFS_FILE.fullmatch(file.name) for file in root.iterdir()):
        return f"{root}: this is the folder of one dataset; give the folder above it"
    if not pairs:
        return f"{root}: no DATASET/refs(SPLIT_BY).p below it; is it the folder of the REFER data?"
    split_bys = [by for name, by in pairs if name == dataset]
    if split_bys:
        return f"{root / dataset}: no refs({split_by}).p; there is split_by {', '.join(split_bys)}"
    names = sorted({name for name, _ in pairs})
    return f"{root}: no dataset {dataset!r}; there is {', '.join(names)}"
