"""Choice of the referred objects in train2014, and the splits of each dataset.

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

# Fractions of the train2014 images in RefCOCO (and RefCOCO+) and in RefCOCOg, and of the held-out ones.
UNC_SHARE, UNC_VAL, UNC_TEST = 0.36, 0.038, 0.02
UMD_SHARE, UMD_VAL, UMD_TEST = 0.27, 0.02, 0.03
GOOGLE_SHARE = 0.06

MAX_REFS = 3


@dataclass(frozen=True)
class Referent:
    """A referred object: index `thing` of a picture, in an image-wise split."""

    picture: Picture
    thing: int
    split: str


def _referable(picture: Picture, styles: Sequence[Style]) -> list[int]:
    return [
        i
        for i, thing in enumerate(picture.things)
        if not thing.crowd and all(is_referable(i, picture.things, m) for m in styles)
    ]


def _count_repeated(picture: Picture) -> dict[str, int]:
    counts = Counter(t.category.name for t in picture.things if not t.crowd)
    return {name: n for name, n in counts.items() if n > 1}


def _sample_things(rng: np.random.Generator, picture: Picture, allowed: list[int]) -> list[int]:
    """Up to MAX_REFS of the allowed things, those of a repeated category first, as in REFER."""
    repeated = _count_repeated(picture)
    shuffled = [allowed[k] for k in rng.permutation(len(allowed)).tolist()]
    shuffled.sort(key=lambda i: picture.things[i].category.name not in repeated)
    return shuffled[: int(rng.integers(1, MAX_REFS + 1))]


def _at_least_one(share: float, total: int) -> int:
    return max(1, round(share * total))


def unc(rng: np.random.Generator, pictures: Sequence[Picture]) -> list[Referent]:
    """Objects of RefCOCO and RefCOCO+ with their unc split: train, val, testA or testB."""
    total = len(pictures)
    held_out = {"testA": _at_least_one(UNC_TEST, total), "testB": _at_least_one(UNC_TEST, total)}
    held_out["val"] = _at_least_one(UNC_VAL, total)
    remaining = {**held_out, "train": max(1, round(UNC_SHARE * total) - sum(held_out.values()))}
    referred: list[Referent] = []
    for k in rng.permutation(total).tolist():
        picture = pictures[k]
        persons = [i for i, t in enumerate(picture.things) if t.category == PERSON]
        if not _count_repeated(picture):
            continue
        referable = _referable(picture, (REFCOCO, REFCOCO_PLUS))
        for split in [s for s in held_out if remaining[s]] or ["train"]:
            if split == "testA":
                allowed = [i for i in referable if i in persons] if len(persons) > 1 else []
            elif split == "testB":
                allowed = [i for i in referable if i not in persons]
            else:
                allowed = referable
            if allowed and remaining[split]:
                remaining[split] -= 1
                referred += [Referent(picture, i, split) for i in _sample_things(rng, picture, allowed)]
                break
        if not any(remaining.values()):
            break
    return referred


def umd(rng: np.random.Generator, pictures: Sequence[Picture]) -> list[Referent]:
    """Objects of RefCOCOg with their umd split: train, val or test."""
    total = len(pictures)
    remaining = {"val": _at_least_one(UMD_VAL, total), "test": _at_least_one(UMD_TEST, total)}
    remaining["train"] = max(1, round(UMD_SHARE * total) - sum(remaining.values()))
    referred: list[Referent] = []
    for k in rng.permutation(total).tolist():
        split = next((s for s in remaining if remaining[s]), None)
        if split is None:
            break
        referable = _referable(pictures[k], (REFCOCOG,))
        if referable:
            remaining[split] -= 1
            referred += [Referent(pictures[k], i, split) for i in _sample_things(rng, pictures[k], referable)[:2]]
    return referred


def google(rng: np.random.Generator, count: int, test: bool) -> list[str]:
    """The google split of each of `count` objects, regardless of images; RefCOCOg's test was never released."""
    part = _at_least_one(GOOGLE_SHARE, count)
    splits = ["train"] * count
    order = rng.permutation(count).tolist()
    for name, objects in (("val", order[:part]), ("test", order[part : 2 * part] if test else [])):
        for k in objects:
            splits[k] = name
    return splits
