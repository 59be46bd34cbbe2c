"""Ids as programs give them, and the records that they name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import ReferDataError, ReferIdError

Ids = int | Iterable[int]
_Record = TypeVar("_Record")


def ids_of(ids: Ids | str | Iterable[str], texts: bool = False) -> list[Any]:
    """One id or several as a list.

    Args:
        texts: ids may be strings.

    Raises:
        ReferDataError: they are neither integers nor, with ``texts``, strings.
    """
    try:
        several = ids if isinstance(ids, Iterable) and not (texts and isinstance(ids, str)) else [ids]
        # operator.index takes numpy's integers too
        return [one if texts and isinstance(one, str) else operator.index(one) for one in several]  # type: ignore[arg-type]
    except TypeError:
        raise ReferDataError(f"ids are integers or lists of integers, not {ids!r:.40}") from None


def records_of(records: Mapping[Any, _Record], ids: list[Any], what: str) -> list[_Record]:
    """The records with these ids; ReferIdError names the first that is not there, as a ``what``."""
    for one in ids:
        if one not in records:
            raise ReferIdError(f"no {what} with id {one!r:.80}")
    return [records[one] for one in ids]
