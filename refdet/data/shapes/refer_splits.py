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
from refdet.data.shapes.phrases import REFCOCO, REFCOCO_PLUS, REFCOCOG, Manner, can_be_meant

# Fractions of the train2014 images in RefCOCO (and RefCOCO+) and in RefCOCOg, and of the held-out ones.
UNC_SHARE, UNC_VAL, UNC_TEST = 0.36, 0.038, 0.02
UMD_SHARE, UMD_VAL, UMD_TEST = 0.27, 0.02, 0.03
GOOGLE_SHARE = 0.06

MOST_REFS = 3


@dataclass(frozen=True)
class Referred:
    """A referred object: index `thing` of a picture, in an image-wise split."""

    picture: Picture
    thing: int
    split: str


def _referable(picture: Picture, manners: Sequence[Manner]) -> list[int]:
    return [
        i
        for i, thing in enumerate(picture.things)
        if not thing.crowd and all(can_be_meant(i, picture.things, m) for m in manners)
    ]


def _repeated(picture: Picture) -> dict[str, int]:
    counts = Counter(t.category.name for t in picture.things if not t.crowd)
    return {name: n for name, n in counts.items() if n > 1}


def _some(rng: np.random.Generator, picture: Picture, allowed: list[int]) -> list[int]:
    """Up to MOST_REFS of the allowed things, those of a repeated category first, as in REFER."""
    repeated = _repeated(picture)
    shuffled = [allowed[k] for k in rng.permutation(len(allowed)).tolist()]
    shuffled.sort(key=lambda i: picture.things[i].category.name not in repeated)
    return shuffled[: int(rng.integers(1, MOST_REFS + 1))]


def _at_least_one(share: float, total: int) -> int:
    return max(1, round(share * total))


def unc(rng: np.random.Generator, pictures: Sequence[Picture]) -> list[Referred]:
    """Objects of RefCOCO and RefCOCO+ with their unc split: train, val, testA or testB."""
    total = len(pictures)
    held = {"testA": _at_least_one(UNC_TEST, total), "testB": _at_least_one(UNC_TEST, total)}
    held["val"] = _at_least_one(UNC_VAL, total)
    left = {**held, "train": max(1, round(UNC_SHARE * total) - sum(held.values()))}
    found: list[Referred] = []
    for k in rng.permutation(total).tolist():
        picture = pictures[k]
        persons = [i for i, t in enumerate(picture.things) if t.category == PERSON]
        if not _repeated(picture):
            continue
        referable = _referable(picture, (REFCOCO, REFCOCO_PLUS))
        for split in [s for s in held if left[s]] or ["train"]:
            if split == "testA":
                allowed = [i for i in referable if i in persons] if len(persons) > 1 else []
            elif split == "testB":
                allowed = [i for i in referable if i not in persons]
            else:
                allowed = referable
            if allowed and left[split]:
                left[split] -= 1
                found += [Referred(picture, i, split) for i in _some(rng, picture, allowed)]
                break
        if not any(left.values()):
            break
    return found


def umd(rng: np.random.Generator, pictures: Sequence[Picture]) -> list[Referred]:
    """Objects of RefCOCOg with their umd split: train, val or test."""
    total = len(pictures)
    left = {"val": _at_least_one(UMD_VAL, total), "test": _at_least_one(UMD_TEST, total)}
    left["train"] = max(1, round(UMD_SHARE * total) - sum(left.values()))
    found: list[Referred] = []
    for k in rng.permutation(total).tolist():
        split = next((s for s in left if left[s]), None)
        if split is None:
            break
        referable = _referable(pictures[k], (REFCOCOG,))
        if referable:
            left[split] -= 1
            found += [Referred(pictures[k], i, split) for i in _some(rng, pictures[k], referable)[:2]]
    return found


def google(rng: np.random.Generator, count: int, test: bool) -> list[str]:
    """The google split of each of `count` objects, regardless of images; RefCOCOg's test was never released."""
    part = _at_least_one(GOOGLE_SHARE, count)
    splits = ["train"] * count
    order = rng.permutation(count).tolist()
    for name, objects in (("val", order[:part]), ("test", order[part : 2 * part] if test else [])):
        for k in objects:
            splits[k] = name
    return splits
