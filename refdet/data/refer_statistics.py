"""Compare the size of REFER data with the published size, to detect a damaged download."""

from __future__ import annotations

from collections.abc import Iterable

from refer.statistics import COUNTS, Counts
from refer.types import Ref


def counts_of(refs: Iterable[Ref]) -> dict[str, Counts]:
    """Number of refs, images and sentences of each split of a dataset and split_by."""
    images: dict[str, set[int]] = {}
    numbers: dict[str, list[int]] = {}
    for ref in refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
        number = numbers.setdefault(ref["split"], [0, 0])
        number[0] += 1
        number[1] += len(ref["sentences"])
    return {split: Counts(number[0], len(images[split]), number[1]) for split, number in numbers.items()}


def differences(dataset: str, split_by: str, found: dict[str, Counts], samples: bool = True) -> list[str]:
    """List the differences between a dataset and the published one, one line per split.

    With ``samples``, a dataset with less than half of the published refs in every split is taken as an intentional
    sample and not compared.

    Args:
        dataset: such as "refcoco".
        split_by: such as "unc".
        found: counts of each split, as of `counts_of`.
        samples: whether the dataset may be a sample.

    Returns:
        The lines, [] if there is no difference.
    """
    published = COUNTS.get((dataset, split_by), {})
    nothing = Counts(0, 0, 0)
    if samples and not any(2 * found.get(split, nothing).refs >= counts.refs for split, counts in published.items()):
        return []
    lines = []
    for split, right in published.items():
        own = found.get(split, nothing)
        wrong = [
            f"{there:,} {what} instead of the published {wanted:,}"
            for what, there, wanted in zip(Counts._fields, own, right, strict=True)
            if wanted is not None and there != wanted
        ]
        if wrong:
            lines.append(f"{dataset}/{split_by}/{split}: {', '.join(wrong)}")
    return lines
