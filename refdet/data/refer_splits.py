"""Select splits of a REFER dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refdet.errors import ArgumentError, InputError
from refer.types import Ref


def choose_splits(refs: Iterable[Ref], requested: Sequence[str], where: str, skip: Sequence[str] = ()) -> list[str]:
    """Return the requested splits, or all splits of the refs except those in ``skip``.

    Args:
        refs: the refs of a dataset and split_by.
        requested: split names, possibly several separated by commas; empty for all.
        where: where the refs are from, such as a file, for error messages.
        skip: splits to omit unless they are requested.

    Returns:
        Names of the splits.

    Raises:
        ArgumentError: ``requested`` is a string, not a list.
        InputError: an unknown split; the message lists the existing ones.
    """
    if isinstance(requested, str):
        raise ArgumentError("splits", f"a list of names is needed, not {requested!r}")
    existing = list(dict.fromkeys(ref["split"] for ref in refs))
    names = list(dict.fromkeys(name.strip() for text in requested for name in text.split(",") if name.strip()))
    for name in names:
        if name not in existing:
            raise InputError(f"`splits` {name}: no such split in {where}; choose from {', '.join(sorted(existing))}")
    return names or sorted(name for name in existing if name not in skip)
