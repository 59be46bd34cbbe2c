"""Images of REFER's splits: those that a detector must not be trained on, or the only ones that it may see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import refer
from refdet.data.refer_statistics import compare_with_published, count_refs
from refdet.errors import InputError
from refdet.files.short_text import agree, format_share, shorten
from refdet.splits.unrecognized_refs import find_unrecognized_refs, refer_root_below
from refdet.structures.coco_ids import bare_number, numbers_in_name
from refer.types import Ref

TRAIN = "train"
# RefClef has no COCO images; its ids would match unrelated COCO images.
NOT_COCO = ("refclef",)
# Datasets that results are commonly reported on, as (dataset, split_by). Those in one group have the same val and test
# images, so one of them is enough.
STANDARD = ((("refcoco", "unc"), ("refcoco+", "unc")), (("refcocog", "umd"),))


@dataclass(frozen=True)
class SplitImages:
    """The images of one split of REFER, or of another benchmark (`refdet.splits.benchmark`).

    Attributes:
        name: such as "refcoco/unc/val" or "benchmark/ref-l4.parquet".
        image_ids: COCO ids of its images.
        shared: number of its images that also have refs in the train split of the same dataset and split_by; 0 for a
            benchmark.
    """

    name: str
    image_ids: frozenset[int]
    shared: int


def held_out(refer_root: str | Path, exclude: Sequence[str] = ()) -> tuple[list[SplitImages], list[str]]:
    """Find the splits to hold out.

    Args:
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        exclude: splits to hold out, each "DATASET:SPLIT_BY" (all but train) or "DATASET:SPLIT_BY:SPLIT,...". Empty
            holds out all but train of every dataset and split_by found.

    Returns:
        The splits ordered by name, and human-readable warnings.

    Raises:
        InputError: no refs found, only train refs, or an unknown name in ``exclude`` (the choices are listed).
        refer.ReferError: a refs file is damaged.
    """
    datasets, notes = _find_datasets(refer_root)
    selections = [_parse_selection("exclude", text, datasets) for text in exclude]
    splits, more = _select_splits(
        refer_root, selections or [_Selection(*pair) for pair in datasets], "exclude", skip=TRAIN
    )
    notes += more
    if not splits:
        raise InputError(
            f"{refer_root}: all its refs are in the train split, nothing to hold out; add refs with val or test splits"
        )
    if not exclude:
        for group in STANDARD:
            if not set(group) & set(datasets):
                names = " nor ".join("/".join(pair) for pair in group)
                notes.append(f"{refer_root}: no {names} found, so their val and test images are not held out")
    for split in splits:
        if split.shared:
            notes.append(
                f"{split.name}: {format_share(split.shared, len(split.image_ids), 'image')} also "
                f"{agree(split.shared, 'has')} train refs (this dataset is split by object); held out as well"
            )
    return splits, notes


def splits_to_keep(refer_root: str | Path, keep_only: Sequence[str]) -> tuple[list[SplitImages], list[str]]:
    """Find the splits that ``keep_only`` names: only their images stay in a training file, the reverse of `held_out`.

    Args:
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        keep_only: splits to keep, each "DATASET:SPLIT_BY" (all its splits) or "DATASET:SPLIT_BY:SPLIT,...".

    Returns:
        The splits ordered by name, and human-readable warnings.

    Raises:
        InputError: no refs found, or an unknown name (the choices are listed).
        refer.ReferError: a refs file is damaged.
    """
    datasets, notes = _find_datasets(refer_root)
    selections = [_parse_selection("keep_only", text, datasets) for text in keep_only]
    splits, more = _select_splits(refer_root, selections, "keep_only", skip=None)
    return splits, notes + more


class _Selection(NamedTuple):
    """Splits of a dataset and split_by; ``splits`` is empty for all of them."""

    dataset: str
    split_by: str
    splits: tuple[str, ...] = ()


def _find_datasets(refer_root: str | Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(dataset, split_by) pairs of COCO images, and warnings about what is not read."""
    available = refer.available(refer_root)
    pairs = [pair for pair in available if pair[0] not in NOT_COCO]
    skipped = sorted({dataset for dataset, _ in available} & set(NOT_COCO))
    misnamed = find_unrecognized_refs(refer_root)
    if not pairs:
        below = refer_root_below(refer_root, misnamed)
        if below:
            fix = f"give the folder below it: {below}"
        else:
            hint = f" (rename {str(misnamed[0])!r}, which is not read)" if misnamed else ""
            fix = f"give the REFER data folder, or get it with refdet fetch-data{hint}"
        raise InputError(f"{refer_root}: no DATASET/refs(SPLIT_BY).p of COCO images found; {fix}")
    notes = [f"{dataset}: skipped, its images are not from COCO" for dataset in skipped]
    return pairs, notes + [
        f"{str(path)!r}: not read; rename it to {refer_root}/DATASET/refs(SPLIT_BY).p" for path in misnamed
    ]


def _parse_selection(argument: str, text: str, datasets: Collection[tuple[str, str]]) -> _Selection:
    """Parse "DATASET:SPLIT_BY[:SPLIT,...]", the value of ``argument``."""
    parts = text.split(":")
    names = tuple(parts[2].split(",")) if len(parts) == 3 else ()
    if len(parts) not in (2, 3) or not all(parts) or not all(names):
        raise InputError(f"`{argument}` {text}: invalid split; use DATASET:SPLIT_BY or DATASET:SPLIT_BY:SPLIT,...")
    if (parts[0], parts[1]) not in datasets:
        choices = ", ".join(f"{dataset}:{split_by}" for dataset, split_by in datasets)
        raise InputError(f"`{argument}` {text}: no such dataset and split_by; choose from {choices}")
    return _Selection(parts[0], parts[1], names)


def _select_splits(
    refer_root: str | Path, selections: Iterable[_Selection], argument: str, skip: str | None
) -> tuple[list[SplitImages], list[str]]:
    """Read the selected splits.

    Args:
        refer_root: folder with DATASET/refs(SPLIT_BY).p files.
        selections: the splits; one may be selected repeatedly.
        argument: name of the argument that selects them, for messages.
        skip: a split to leave out unless it is named.

    Returns:
        The splits ordered by name, and human-readable warnings.
    """
    by_name: dict[str, SplitImages] = {}
    notes: dict[str, None] = {}
    for dataset, split_by, named_splits in selections:
        images, warnings = _images_by_split(refer_root, dataset, split_by)
        notes |= dict.fromkeys(warnings)
        unknown = [name for name in named_splits if name not in images]
        if unknown:
            raise InputError(
                f"`{argument}` {dataset}:{split_by}: no split {unknown[0]!r}; choose from {', '.join(sorted(images))}"
            )
        train = images.get(TRAIN, frozenset())
        for name in named_splits or sorted(set(images) - {skip}):
            shared = len(images[name] & train) if name != TRAIN else 0
            full_name = f"{dataset}/{split_by}/{name}"
            by_name[full_name] = SplitImages(full_name, images[name], shared)
    return [by_name[name] for name in sorted(by_name)], list(notes)


def _images_by_split(root: str | Path, dataset: str, split_by: str) -> tuple[dict[str, frozenset[int]], list[str]]:
    """COCO ids of the images of each split of a dataset, by its name, and human-readable warnings about the refs."""
    images: dict[str, set[int]] = {}
    refs = refer.read_refs(root, dataset, split_by)
    for ref in refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
    lines = compare_with_published(dataset, split_by, count_refs(refs))
    notes = [f"{line}; {Path(root) / dataset} may be a damaged download" for line in lines]
    # In REFER's own data the file name has the image_id in 12 digits, such as COCO_train2014_000000000009.jpg.
    # `numbers_in_name` finds such numbers anywhere in a name, `bare_number` one that is all of the name, such as 9.jpg.
    deviating = [ref for ref in refs if f"{ref['image_id']:012d}" not in ref.get("file_name", "")]
    renumbered = [ref for ref in deviating if numbers_in_name(ref.get("file_name", ""))]
    for ref in renumbered:
        images[ref["split"]] |= numbers_in_name(ref["file_name"])
    if renumbered:
        first = renumbered[0]
        notes.append(
            f"{dataset}/{split_by}: the image_id of {format_share(len(renumbered), len(refs), 'ref')} is not the COCO "
            f"number in the file_name (first: {first['image_id']}, {shorten(first['file_name'])}); both are taken "
            "as images of its split"
        )
    unnumbered = [file for ref in deviating if (file := _unnumbered_file_name(ref))]
    if unnumbered:
        notes.append(
            f"{dataset}/{split_by}: the file_name of {format_share(len(unnumbered), len(refs), 'ref')} has no COCO "
            f"number (first: {shorten(unnumbered[0])}); the image_id is taken as COCO's, and other images are not "
            "looked for"
        )
    return {split: frozenset(ids) for split, ids in images.items()}, notes


def _unnumbered_file_name(ref: Ref) -> str:
    """The file name of a ref if it has neither a COCO number of 12 digits nor its image_id, else ""."""
    file = ref.get("file_name", "")
    return "" if numbers_in_name(file) or bare_number(file) == ref["image_id"] else file
