"""Sample the referents in train2014, and assign them to the splits of each dataset.

unc (RefCOCO, RefCOCO+) and umd (RefCOCOg) split by image; google splits by object, so that an image can be in several
splits. testA has images with several persons and refers to persons, testB to other things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refdet.data.shapes.categories import PERSON
from refdet.data.shapes.coco_files import Picture
from refdet.data.shapes.phrases import REFCOCO, REFCOCO_PLUS, REFCOCOG, Style, is_referable

# Fractions of the train2014 images that are in RefCOCO and RefCOCO+ (unc) or RefCOCOg (umd), in their val split, and in
# each of their test splits. Then the fraction of the refs that is in each held-out split of google.
UNC_SHARE, UNC_VAL, UNC_TEST = 0.36, 0.038, 0.02
UMD_SHARE, UMD_VAL, UMD_TEST = 0.27, 0.02, 0.03
GOOGLE_HELD_OUT_SHARE = 0.06

MAX_REFS, _UMD_MAX_REFS = 3, 2  # per image


@dataclass(frozen=True)
class Referent:
    """A referred object: the index `thing` in a picture's things, and its split in unc or umd."""

    picture: Picture
    thing: int
    split: str


def _find_referable(picture: Picture, styles: Sequence[Style]) -> list[int]:
    """Indices of the things that have an unambiguous expression in each of the styles."""
    return [
        i
        for i, thing in enumerate(picture.things)
        if not thing.crowd and all(is_referable(i, picture.things, style) for style in styles)
    ]


def _repeated_categories(picture: Picture) -> set[str]:
    """Names of the categories that several things have."""
    counts = Counter(t.category.name for t in picture.things if not t.crowd)
    return {name for name, count in counts.items() if count > 1}


def _sample_things(rng: np.random.Generator, picture: Picture, allowed: list[int]) -> list[int]:
    """Sample up to MAX_REFS of the allowed things, those of a repeated category first, as in REFER."""
    repeated = _repeated_categories(picture)
    shuffled = [allowed[k] for k in rng.permutation(len(allowed)).tolist()]
    shuffled.sort(key=lambda i: picture.things[i].category.name not in repeated)
    return shuffled[: int(rng.integers(1, MAX_REFS + 1))]


def _at_least_one(share: float, total: int) -> int:
    """A share of a total, rounded, but at least 1."""
    return max(1, round(share * total))


def sample_unc(rng: np.random.Generator, pictures: Sequence[Picture]) -> list[Referent]:
    """Sample the referents of RefCOCO and RefCOCO+, with their unc split: train, val, testA or testB.

    As in RefCOCO, they are in images with several things of a category.
    """
    total = len(pictures)
    held_out = {"testA": _at_least_one(UNC_TEST, total), "testB": _at_least_one(UNC_TEST, total)}
    held_out["val"] = _at_least_one(UNC_VAL, total)
    # images still to be chosen for each split; the held-out splits are filled first
    remaining = {**held_out, "train": max(1, round(UNC_SHARE * total) - sum(held_out.values()))}
    referents: list[Referent] = []
    for k in rng.permutation(total).tolist():
        picture = pictures[k]
        persons = [i for i, t in enumerate(picture.things) if t.category == PERSON]
        if not _repeated_categories(picture):
            continue
        referable = _find_referable(picture, (REFCOCO, REFCOCO_PLUS))
        for split in [s for s in held_out if remaining[s]] or ["train"]:
            if split == "testA":
                allowed = [i for i in referable if i in persons] if len(persons) > 1 else []
            elif split == "testB":
                allowed = [i for i in referable if i not in persons]
            else:
                allowed = referable
            if allowed and remaining[split]:
                remaining[split] -= 1
                referents += [Referent(picture, i, split) for i in _sample_things(rng, picture, allowed)]
                break
        if not any(remaining.values()):
            break
    return referents


def sample_umd(rng: np.random.Generator, pictures: Sequence[Picture]) -> list[Referent]:
    """Sample the referents of RefCOCOg, with their umd split: train, val or test."""
    total = len(pictures)
    remaining = {"val": _at_least_one(UMD_VAL, total), "test": _at_least_one(UMD_TEST, total)}
    remaining["train"] = max(1, round(UMD_SHARE * total) - sum(remaining.values()))
    referents: list[Referent] = []
    for k in rng.permutation(total).tolist():
        split = next((s for s in remaining if remaining[s]), None)
        if split is None:
            break
        referable = _find_referable(pictures[k], (REFCOCOG,))
        if referable:
            remaining[split] -= 1
            referents += [
                Referent(pictures[k], i, split) for i in _sample_things(rng, pictures[k], referable)[:_UMD_MAX_REFS]
            ]
    return referents


def google_splits(rng: np.random.Generator, count: int, test: bool) -> list[str]:
    """Sample the google split of `count` objects, regardless of images.

    There are test objects only with `test`: RefCOCOg's google test split was not released.
    """
    held_out = _at_least_one(GOOGLE_HELD_OUT_SHARE, count)
    splits = ["train"] * count
    order = rng.permutation(count).tolist()
    for k in order[:held_out]:
        splits[k] = "val"
    if test:
        for k in order[held_out : 2 * held_out]:
            splits[k] = "test"
    return splits
