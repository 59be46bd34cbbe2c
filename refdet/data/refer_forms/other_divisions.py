"""Splits of a source that belong to another division of the dataset, as lmms-lab/RefCOCO mixes unc's and google's."""

from __future__ import annotations

from collections.abc import Sequence

from refdet.data.refer_forms.records import SourceRef
from refer.statistics import COUNTS, Counts


def size_of(refs: Sequence[SourceRef]) -> Counts:
    """Number of refs and of their images."""
    return Counts(len(refs), len({ref.image_id for ref in refs}))


def own_part(dataset: str, split_by: str, split: str, refs: Sequence[SourceRef]) -> tuple[list[SourceRef], str]:
    """The refs of a split that are of a division, recognized by the published sizes.

    A split of another division is left out. Of one that holds this division's split and another division's one after
    the other, the part is taken whose number of refs and images is this division's, if the rest has the other's.

    Args:
        dataset: such as "refcoco".
        split_by: such as "unc".
        split: name of the split in the source.
        refs: its refs, in the order of the source.

    Returns:
        The refs of this division, and a human-readable note about those that are left out, "" for none.
    """
    published = COUNTS.get((dataset, split_by), {})
    others = [by for name, by in COUNTS if name == dataset and by != split_by]
    size = size_of(refs)
    if any(_is(size, right) for right in published.values()):
        return list(refs), ""
    for other in others:
        for name, right in COUNTS[dataset, other].items():
            if split not in published and _is(size, right):
                return [], f"split {split!r} is {dataset}/{other}/{name}; it is left out"
        own, its = published.get(split), COUNTS[dataset, other].get(split)
        if own is None or its is None or size.refs != own.refs + its.refs:
            continue
        halves = ((refs[: own.refs], refs[own.refs :]), (refs[its.refs :], refs[: its.refs]))
        fitting = [mine for mine, rest in halves if _is(size_of(mine), own) and _is(size_of(rest), its)]
        if len(fitting) == 1:
            note = f"split {split!r} also has the {its.refs:,} refs of {dataset}/{other}/{split}; they are left out"
            return list(fitting[0]), note
    return list(refs), ""


def _is(size: Counts, published: Counts) -> bool:
    return size[:2] == published[:2]
