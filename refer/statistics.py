"""Archives of the published datasets and their numbers of refs, images and sentences.

Counts: Yu et al., "Modeling Context in Referring Expressions" (2016) and its data page; Nagaraja et al. (2016) for the
umd division; Liu, Ding and Jiang, "GRES" (2023) for gRefCOCO.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Counts(NamedTuple):
    """Size of a split.

    Attributes:
        refs: number of refs.
        images: number of images.
        sentences: number of sentences, None if not published.
    """

    refs: int
    images: int
    sentences: int | None = None


_ARCHIVED = ("refclef", "refcoco", "refcoco+", "refcocog")  # published as DATASET.zip
COUNTS: dict[tuple[str, str], dict[str, Counts]] = {
    ("refcoco", "unc"): {
        "train": Counts(42404, 16994),
        "val": Counts(3811, 1500, 10834),
        "testA": Counts(1975, 750, 5657),
        "testB": Counts(1810, 750, 5095),
    },
    ("refcoco", "google"): {"train": Counts(40000, 19213), "val": Counts(5000, 4559), "test": Counts(5000, 4527)},
    ("refcoco+", "unc"): {
        "train": Counts(42278, 16992),
        "val": Counts(3805, 1500, 10758),
        "testA": Counts(1975, 750, 5726),
        "testB": Counts(1798, 750, 4889),
    },
    ("refcocog", "umd"): {
        "train": Counts(42226, 21899),
        "val": Counts(2573, 1300, 4896),
        "test": Counts(5023, 2600),
    },
    ("refcocog", "google"): {"train": Counts(44822, 24698), "val": Counts(5000, 4650)},
}
_DESCRIPTIONS = {
    "refclef": "about 20000 images, from saiapr_tc-12.zip instead of COCO, split by unc and by berkeley",
    "grefcoco": "278232 sentences on 19994 images, split by unc",
}


def how_to_get(root: Path, dataset: str, split_by: str) -> str:
    """Describe how to get a dataset's archive, where to extract it and what it contains; "" for an unknown dataset."""
    split_bys = sorted(by for name, by in COUNTS if name == dataset)
    if dataset == "grefcoco":
        source = f"download grefs({split_by}).json and instances.json (github.com/henghuiding/gRefCOCO) into"
    elif dataset in _ARCHIVED:
        names = [split_by] if split_by in split_bys or not split_bys else split_bys
        files = ", ".join(["instances.json", *(f"refs({name}).p" for name in names)])
        command = f"refdet fetch-data --only {dataset}"
        hint = f"{command} --out {root.parent}" if root.name == "refer" else f"{command}, which puts it in data/refer"
        source = f"unpack {dataset}.zip (or run {hint}) so that {files} are in"
    else:
        return ""
    if split_by in split_bys or len(split_bys) == 1:
        by = split_by if split_by in split_bys else split_bys[0]
        splits = (f"{split} {size.refs} refs on {size.images} images" for split, size in COUNTS[dataset, by].items())
        description = f"split by {by}: {', '.join(splits)}"
    else:
        description = _DESCRIPTIONS.get(dataset) or f"split by {' and by '.join(split_bys)}"
    return f"{source} {root / dataset} (complete: {description})"
