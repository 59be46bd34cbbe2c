"""Look up records by ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import ReferDataError, ReferIdError

Ids = int | Iterable[int]
_Record = TypeVar("_Record")


def ids_of(ids: Ids | str | Iterable[str], allow_strings: bool = False) -> list[Any]:
    """Convert one id or several to a list.

    Args:
        ids: one id or several.
        allow_strings: whether ids may be strings.

    Returns:
        The ids.

    Raises:
        ReferDataError: an id is not an integer, or a string with ``allow_strings``.
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
