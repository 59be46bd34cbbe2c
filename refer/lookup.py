"""Look up records by ids, and splits by name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import ReferDataError, ReferIdError

# Splits of the published data; one that a dataset lacks has no refs.
_SPLITS = ("train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "testAC")

Ids = int | Iterable[int]
_Record = TypeVar("_Record")


def ids_of(ids: Ids | str | Iterable[str], allow_strings: bool = False) -> list[Any]:
    """Convert one id or several to a list.

    Args:
        ids: one id or several.
        allow_strings: whether ids may be strings; a single string is then one id.

    Returns:
        The ids.

    Raises:
        ReferDataError: an id is neither an integer nor, with ``allow_strings``, a string.
    """
    try:
        values = ids if isinstance(ids, Iterable) and not (allow_strings and isinstance(ids, str)) else [ids]
        # operator.index also accepts numpy integers
        return [id_ if allow_strings and isinstance(id_, str) else operator.index(id_) for id_ in values]  # type: ignore[arg-type]
    except TypeError:
        raise ReferDataError(f"ids must be integers or lists of integers, not {ids!r:.40}") from None


def records_of(records: Mapping[Any, _Record], ids: list[Any], kind: str) -> list[_Record]:
    """Return the records with these ids; raises ReferIdError with their ``kind``, such as "ref", for an unknown id."""
    for id_ in ids:
        if id_ not in records:
            raise ReferIdError(f"no {kind} with id {id_!r:.80}")
    return [records[id_] for id_ in ids]


def matching_splits(folder: str, requested: str, existing: Iterable[str]) -> set[str]:
    """Return the splits of a dataset that a name matches, as in the original.

    Args:
        folder: folder of the dataset, for the error message.
        requested: name of a split: "test" matches every test split, "testA" those with an A after "test" (testA, testAB
            and testAC), any other only itself.
        existing: names of the splits that have refs.

    Returns:
        Names of the matching splits; one may have no refs if it is one of `_SPLITS`.

    Raises:
        ReferDataError: ``requested`` is neither in ``existing`` nor in `_SPLITS`.
    """
    names = set(existing)
    if requested not in names and requested not in _SPLITS:
        raise ReferDataError(f"{folder}: no split {requested!r}; choose from {', '.join(sorted(names))}")
    tests = {name for name in names if name.startswith("test")}
    if requested == "test":
        return tests
    if requested in ("testA", "testB", "testC"):
        return {name for name in tests if requested[-1] in name.removeprefix("test")}
    return {requested}
