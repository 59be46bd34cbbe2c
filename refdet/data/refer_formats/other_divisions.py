"""Leave out refs of another split_by ("division") of a dataset: lmms-lab/RefCOCO mixes those of unc and google."""

from __future__ import annotations

from collections.abc import Sequence

from refdet.data.refer_formats.records import SourceRef
from refer.statistics import COUNTS, Counts


def size_of(refs: Sequence[SourceRef]) -> Counts:
    """Count refs and their images, but not their sentences."""
    return Counts(len(refs), len({ref.image_id for ref in refs}))


def refs_of_division(dataset: str, split_by: str, split: str, refs: Sequence[SourceRef]) -> tuple[list[SourceRef], str]:
    """Select the refs of a split that belong to a division, recognized by the published sizes.

    A split of another division is left out. If a split is the concatenation of the split of this name in this division
    and in another one, in either order, only the part of this division is taken. If no published size explains the
    split, all of it is taken.

    Args:
        dataset: such as "refcoco".
        split_by: the division, such as "unc".
        split: name of the split in the source.
        refs: the refs of the split, in the order of the source.

    Returns:
        The refs of this division, and a human-readable note about omitted refs, "" for none.
    """
    published = COUNTS.get((dataset, split_by), {})
    others = [by for name, by in COUNTS if name == dataset and by != split_by]
    size = size_of(refs)
    if any(_same_size(size, expected) for expected in published.values()):
        return list(refs), ""
    for other in others:
        for name, expected in COUNTS[dataset, other].items():
            if split not in published and _same_size(size, expected):
                return [], f"split {split!r} is {dataset}/{other}/{name}; it is left out"
        own_counts, other_counts = published.get(split), COUNTS[dataset, other].get(split)
        if own_counts is None or other_counts is None or size.refs != own_counts.refs + other_counts.refs:
            continue
        halves = (
            (refs[: own_counts.refs], refs[own_counts.refs :]),
            (refs[other_counts.refs :], refs[: other_counts.refs]),
        )
        matching = [
            candidate
            for candidate, rest in halves
            if _same_size(size_of(candidate), own_counts) and _same_size(size_of(rest), other_counts)
        ]
        if len(matching) == 1:
            rest_name = f"the {other_counts.refs:,} refs of {dataset}/{other}/{split}"
            return list(matching[0]), f"split {split!r} also has {rest_name}; they are left out"
    return list(refs), ""


def _same_size(size: Counts, published: Counts) -> bool:
    """Whether the numbers of refs and images are equal."""
    return (size.refs, size.images) == (published.refs, published.images)
