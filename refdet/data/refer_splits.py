"""Which splits of the refs a command is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refdet.errors import InputError
from refer.types import Ref


def choose_splits(refs: Iterable[Ref], wanted: Sequence[str], where: str, skip: Sequence[str] = ()) -> list[str]:
    """The splits asked for, or all that the refs have but those in ``skip``.

    Args:
        refs: the refs of one dataset and split_by.
        wanted: names, each possibly several with commas between; empty for all.
        where: names the refs in errors.
        skip: splits to leave out unless they are asked for.

    Raises:
        InputError: a split that no ref has; it lists those there are.
    """
    there = list(dict.fromkeys(ref["split"] for ref in refs))
    names = list(dict.fromkeys(name.strip() for text in wanted for name in text.split(",") if name.strip()))
    for name in names:
        if name not in there:
            raise InputError(f"--split {name}: no such split in {where}; there is {', '.join(sorted(there))}")
    return names or sorted(name for name in there if name not in skip)
