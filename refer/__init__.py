"""Referring expressions of RefCOCO and similar datasets: a drop-in replacement for lichengunc/refer."""

from .api import REFER
from .errors import ReferDataError, ReferError, ReferIdError, ReferNotFoundError
from .files import available, read_refs
from .types import target_ids

__all__ = [
    "REFER",
    "ReferDataError",
    "ReferError",
    "ReferIdError",
    "ReferNotFoundError",
    "available",
    "read_refs",
    "target_ids",
]
