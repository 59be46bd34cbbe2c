"""Compare the size of REFER data with the published size, to detect incomplete or wrong data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from refer.statistics import COUNTS, Counts
from refer.types import Ref


def count_refs(refs: Iterable[Ref]) -> dict[str, Counts]:
    """Count the refs, images and sentences of each split of a dataset and split_by."""
    images: dict[str, set[int]] = {}
    ref_counts: Counter[str] = Counter()
    sentence_counts: Counter[str] = Counter()
    for ref in refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
        ref_counts[ref["split"]] += 1
        sentence_counts[ref["split"]] += len(ref["sentences"])
    return {split: Counts(ref_counts[split], len(images[split]), sentence_counts[split]) for split in ref_counts}


def compare_with_published(
    dataset: str, split_by: str, counts: dict[str, Counts], allow_sample: bool = True
) -> list[str]:
    """List the differences between a dataset and the published one, one line per published split.

    With ``allow_sample``, a dataset with less than half of the published refs in every split is taken as an
    intentional sample and not compared. A dataset without published sizes has no differences.

    Args:
        dataset: such as "refcoco".
        split_by: such as "unc".
        counts: counts of each split, from `count_refs`.
        allow_sample: whether the dataset may be a sample.

    Returns:
        Lines such as "refcoco/unc/val: 3,810 refs instead of the published 3,811"; [] if there is no difference.
    """
    published = COUNTS.get((dataset, split_by), {})
    zero = Counts(0, 0, 0)
    is_sample = all(2 * counts.get(split, zero).refs < expected.refs for split, expected in published.items())
    if allow_sample and is_sample:
        return []
    lines = []
    for split, expected in published.items():
        actual = counts.get(split, zero)
        mismatches = [
            f"{actual_count:,} {name} instead of the published {expected_count:,}"
            for name, actual_count, expected_count in zip(Counts._fields, actual, expected, strict=True)
            if expected_count is not None and actual_count != expected_count
        ]
        if mismatches:
            lines.append(f"{dataset}/{split_by}/{split}: {', '.join(mismatches)}")
    return lines
