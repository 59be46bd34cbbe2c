"""Compare the size of REFER data with the published size, to detect a damaged download."""

from __future__ import annotations

from collections.abc import Iterable

from refer.statistics import COUNTS, Counts
from refer.types import Ref


def count_refs(refs: Iterable[Ref]) -> dict[str, Counts]:
    """Number of refs, images and sentences of each split of a dataset and split_by."""
    images: dict[str, set[int]] = {}
    totals: dict[str, list[int]] = {}
    for ref in refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
        total = totals.setdefault(ref["split"], [0, 0])
        total[0] += 1
        total[1] += len(ref["sentences"])
    return {split: Counts(total[0], len(images[split]), total[1]) for split, total in totals.items()}


def compare_with_published(
    dataset: str, split_by: str, counts: dict[str, Counts], allow_sample: bool = True
) -> list[str]:
    """List the differences between a dataset and the published one, one line per split.

    With ``allow_sample``, a dataset with less than half of the published refs in every split is taken as an
    intentional sample and not compared.

    Args:
        dataset: such as "refcoco".
        split_by: such as "unc".
        counts: counts of each split, from `count_refs`.
        allow_sample: whether the dataset may be a sample.

    Returns:
        Such as "refcoco/unc/val: 3,810 refs instead of the published 3,811"; [] if there is no difference.
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
