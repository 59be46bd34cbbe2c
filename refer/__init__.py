"""Referring expressions of RefCOCO, RefCOCO+ and RefCOCOg: a drop-in for ``from refer import REFER``."""

from .api import REFER
from .errors import ReferDataError, ReferError, ReferNotFoundError
from .files import available, read_refs

__all__ = ["REFER", "ReferDataError", "ReferError", "ReferNotFoundError", "available", "read_refs"]
