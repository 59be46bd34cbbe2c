"""Recognize the datasets and splits of REFER by the names that other formats use for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from refdet.errors import InputError
from refdet.files.short_text import agree, format_count
from refer.statistics import COUNTS, Counts

# not gRefCOCO, whose refs have any number of objects
_DATASET = re.compile(r"(?<!g)refcoco(?P<plus>\+|[-_ ]?plus|p(?![a-z]))?(?P<g>g|[-_ ]g(?![a-z]))?", re.IGNORECASE)
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|test_?a|test_?b|test)(?![a-z])", re.IGNORECASE)
_DEV = re.compile(r"(?<![a-z])dev(?![a-z])", re.IGNORECASE)  # val, but only if a file's name has no other split
_COCO_YEAR = re.compile(r"201[457]")
_SPLIT_BY = re.compile(r"(?<![a-z])(unc|umd|google)(?![a-z])", re.IGNORECASE)
_ALIASES = {"validation": "val", "valid": "val", "dev": "val", "testa": "testA", "testb": "testB"}
# dataset -> split_by of a source that does not name one
DEFAULT_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}


def dataset_in(text: str) -> str:
    """Return the last dataset in a name, "refcoco+" for "RefCOCOplus"; "" if there is none."""
    matches = list(_DATASET.finditer(text))
    if not matches:
        return ""
    return "refcoco+" if matches[-1]["plus"] else "refcocog" if matches[-1]["g"] else "refcoco"


def split_by_in(text: str) -> str:
    """Return the split_by in a name such as "REC_refcoco_unc_val"; "" if there is none."""
    match = _SPLIT_BY.search(text)
    return match[1].lower() if match else ""


def split_in(path: Path) -> str:
    """Return the split in the name of a file, or else of its folder; "" if there is none."""
    if _DEV.search(path.stem) and not _SPLIT.search(path.stem):
        return _ALIASES["dev"]
    for text in (path.stem, path.parent.name):
        matches = list(_SPLIT.finditer(text))
        # "val_train2014" is a val split on images of COCO's train2014
        matches = [match for match in matches if not _COCO_YEAR.match(text, match.end())] or matches
        if matches:
            name = matches[-1][1].replace("_", "")
            return _ALIASES.get(name.lower(), name.lower())
    return ""


def match_split_names(dataset: str, split_by: str, sizes: Mapping[str, Counts]) -> dict[str, str]:
    """Map the split names of a source to REFER's.

    A name that REFER uses is kept, and common ones such as ``validation`` are translated. Other splits are recognized
    by their number of refs and images, or by elimination: ``test`` next to ``testB`` is ``testA``. For a dataset and
    split_by without published sizes, other names are kept too.

    Args:
        dataset: such as "refcoco".
        split_by: such as "unc".
        sizes: name of a split in the source -> its size.

    Returns:
        Name in the source -> name in REFER.

    Raises:
        InputError: a split cannot be recognized, or two splits get the same name.
    """
    published = COUNTS.get((dataset, split_by), {})
    names: dict[str, str] = {}
    lowercase = {name.lower() for name in sizes}
    for name, counts in sizes.items():
        alias = _ALIASES.get(name.lower(), name.lower() if name.lower() in published else name)
        same_size = [split for split, expected in published.items() if (expected.refs, expected.images) == counts[:2]]
        if not published or alias in published:
            names[name] = alias
        elif len(same_size) == 1:
            names[name] = same_size[0]
        elif name.lower() == "test" and "testb" in lowercase and "testa" not in lowercase:
            names[name] = "testA"
        else:
            raise InputError(
                f"split {name!r}: its {format_count(counts.refs, 'ref')} on {format_count(counts.images, 'image')} "
                f"{agree(counts.refs, 'is')} not the size of any split of {dataset}/{split_by} "
                f"({', '.join(published)}); give `split_names={name}=NAME`"
            )
    for refer_name in set(names.values()):
        duplicates = [name for name, assigned in names.items() if assigned == refer_name]
        if len(duplicates) > 1:
            raise InputError(
                f"splits {' and '.join(map(repr, duplicates))} are both {refer_name}; give `split_names=OLD=NEW`"
            )
    return names
