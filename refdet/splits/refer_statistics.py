"""Whether the REFER data at hand is as large as what was published, to tell a damaged download from a whole one."""

from __future__ import annotations

from collections.abc import Iterable

from refer.statistics import COUNTS, Counts
from refer.types import Ref


def counts_of(refs: Iterable[Ref]) -> dict[str, Counts]:
    """The sizes of the splits of one dataset and split_by."""
    images: dict[str, set[int]] = {}
    numbers: dict[str, list[int]] = {}
    for ref in refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
        number = numbers.setdefault(ref["split"], [0, 0])
        number[0] += 1
        number[1] += len(ref["sentences"])
    return {split: Counts(number[0], len(images[split]), number[1]) for split, number in numbers.items()}


def differences(dataset: str, split_by: str, found: dict[str, Counts]) -> list[str]:
    """How a dataset differs from the published one, a line a split; [] if it does not.

    A dataset is compared if one of its splits has at least half of the published refs: less is a sample that
    somebody made on purpose.
    """
    published = COUNTS.get((dataset, split_by), {})
    nothing = Counts(0, 0, 0)
    if not any(2 * found.get(split, nothing).refs >= counts.refs for split, counts in published.items()):
        return []
    lines = []
    for split, right in published.items():
        own = found.get(split, nothing)
        wrong = [
            f"{there:,} {what} instead of {wanted:,}"
            for what, there, wanted in zip(Counts._fields, own, right, strict=True)
            if wanted is not None and there != wanted
        ]
        if wrong:
            lines.append(f"{dataset}/{split_by}/{split}: {', '.join(wrong)}, which is what was published")
    return lines
