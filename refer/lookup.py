"""Look up records by ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import ReferDataError, ReferIdError

Ids = int | Iterable[int]
_Record = TypeVar("_Record")


def ids_of(ids: Ids | str | Iterable[str], texts: bool = False) -> list[Any]:
    """Convert one id or several to a list.

    Args:
        ids: one id or several.
        texts: whether ids may be strings.

    Returns:
        The ids.

    Raises:
        ReferDataError: an id is not an integer, or a string with ``texts``.
    """
    try:
        several = ids if isinstance(ids, Iterable) and not (texts and isinstance(ids, str)) else [ids]
        # operator.index also accepts numpy integers
        return [one if texts and isinstance(one, str) else operator.index(one) for one in several]  # type: ignore[arg-type]
    except TypeError:
        raise ReferDataError(f"ids must be integers or lists of integers, not {ids!r:.40}") from None


def records_of(records: Mapping[Any, _Record], ids: list[Any], what: str) -> list[_Record]:
    """Return the records with these ids; raises ReferIdError for an unknown ``what``."""
    for one in ids:
        if one not in records:
            raise ReferIdError(f"no {what} with id {one!r:.80}")
    return [records[one] for one in ids]
