"""The images of REFER's splits, and which of them a detector must not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import refer
from refdet.errors import InputError
from refdet.splits.refer_statistics import counts_of, differences
from refdet.splits.unrecognized_refs import unrecognized_refs

TRAIN = "train"
# The images of RefClef are not COCO's; its ids would hit COCO images they have nothing to do with.
NOT_COCO = ("refclef",)
# What results are reported on. RefCOCO and RefCOCO+ have the same val and test images.
STANDARD = ((("refcoco", "unc"), ("refcoco+", "unc")), (("refcocog", "umd"),))


@dataclass(frozen=True)
class HeldOut:
    """The images of one split of REFER.

    Attributes:
        name: "refcoco/unc/val".
        image_ids: COCO ids of all its images.
        shared: how many of them hold refs of the train split of the same dataset and split_by too.
    """

    name: str
    image_ids: frozenset[int]
    shared: int


def held_out(refer_root: str | Path, exclude: Sequence[str] = ()) -> tuple[list[HeldOut], list[str]]:
    """The splits to hold out, and warnings_of for people.

    Args:
        refer_root: folder of DATASET/refs(SPLIT_BY).p.
        exclude: what to hold out, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...";
            empty means all but train of every dataset and split_by found.

    Raises:
        InputError: nothing is there, or a name in ``exclude`` is not (the choices are listed).
        refer.ReferError: a refs file is damaged.
    """
    pairs, notes = _pairs(refer_root)
    wanted = [_parse("--exclude", text, pairs) for text in exclude] or [(dataset, by, ()) for dataset, by in pairs]
    splits, more = _splits(refer_root, wanted, "--exclude", skip=TRAIN)
    notes += more
    if not splits:
        raise InputError(f"{refer_root}: its refs are all of the train split; nothing is there to hold out")
    if not exclude:
        for choice in STANDARD:
            if not set(choice) & set(pairs):
                names = " nor ".join("/".join(pair) for pair in choice)
                notes.append(f"{refer_root}: no {names} there, so their val and test images are not held out")
    for split in splits:
        if split.shared:
            notes.append(
                f"{split.name}: {split.shared} of its {len(split.image_ids)} images hold train refs too "
                "(this division is by object); they are held out as well"
            )
    return splits, notes


def chosen(refer_root: str | Path, keep_only: Sequence[str]) -> tuple[list[HeldOut], list[str]]:
    """The splits that ``--keep-only`` names, and warnings_of for people.

    Args:
        keep_only: each "DATASET:SPLIT_BY" (all its splits) or "DATASET:SPLIT_BY:SPLIT,...".

    Raises:
        InputError: nothing is there, or a name is not (the choices are listed).
        refer.ReferError: a refs file is damaged.
    """
    pairs, notes = _pairs(refer_root)
    wanted = [_parse("--keep-only", text, pairs) for text in keep_only]
    splits, more = _splits(refer_root, wanted, "--keep-only", skip=None)
    return splits, notes + more


def _pairs(refer_root: str | Path) -> tuple[list[tuple[str, str]], list[str]]:
    there = refer.available(refer_root)
    pairs = [pair for pair in there if pair[0] not in NOT_COCO]
    skipped = sorted({dataset for dataset, _ in there} & set(NOT_COCO))
    misnamed = unrecognized_refs(refer_root)
    if not pairs:
        hint = f" ({str(misnamed[0])!r} is not read: it must be named so)" if misnamed else ""
        raise InputError(
            f"{refer_root}: no DATASET/refs(SPLIT_BY).p of COCO images below it; is this the REFER data?{hint}"
        )
    notes = [f"{dataset}: left alone, its images are not COCO's" for dataset in skipped]
    return pairs, notes + [
        f"not read: {str(path)!r}; name it {refer_root}/DATASET/refs(SPLIT_BY).p" for path in misnamed
    ]


def _parse(option: str, text: str, pairs: Iterable[tuple[str, str]]) -> tuple[str, str, tuple[str, ...]]:
    parts = text.split(":")
    names = tuple(parts[2].split(",")) if len(parts) == 3 else ()
    if len(parts) not in (2, 3) or not all(parts) or not all(names):
        raise InputError(f"{option} {text}: it must be DATASET:SPLIT_BY or DATASET:SPLIT_BY:SPLIT,...")
    if (parts[0], parts[1]) not in pairs:
        choices = ", ".join(f"{dataset}:{split_by}" for dataset, split_by in pairs)
        raise InputError(f"{option} {text}: no such dataset and split_by; choose from {choices}")
    return parts[0], parts[1], names


def _splits(
    refer_root: str | Path, wanted: Iterable[tuple[str, str, tuple[str, ...]]], option: str, skip: str | None
) -> tuple[list[HeldOut], list[str]]:
    """The splits in ``wanted``, each once, ordered by name; where none is named, all but ``skip``."""
    found: dict[str, HeldOut] = {}
    notes: dict[str, None] = {}
    for dataset, split_by, names in wanted:
        images, warnings_of = _images_by_split(refer_root, dataset, split_by)
        notes |= dict.fromkeys(warnings_of)
        unknown = [name for name in names if name not in images]
        if unknown:
            raise InputError(
                f"{option} {dataset}:{split_by}: no split {unknown[0]!r}; choose from {', '.join(sorted(images))}"
            )
        train = images.get(TRAIN, frozenset())
        for name in names or sorted(set(images) - {skip}):
            shared = len(images[name] & train) if name != TRAIN else 0
            full = f"{dataset}/{split_by}/{name}"
            found[full] = HeldOut(full, images[name], shared)
    return [found[name] for name in sorted(found)], list(notes)


def _images_by_split(root: str | Path, dataset: str, split_by: str) -> tuple[dict[str, frozenset[int]], list[str]]:
    images: dict[str, set[int]] = {}
    refs = refer.read_refs(root, dataset, split_by)
    for ref in refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
    lines = differences(dataset, split_by, counts_of(refs))
    notes = [f"{line}; is {Path(root) / dataset} a damaged download?" for line in lines]
    return {split: frozenset(ids) for split, ids in images.items()}, notes
