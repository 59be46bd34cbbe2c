"""Shorten values and text to fit in a one-line error message."""

from __future__ import annotations

import reprlib

MAX_LENGTH = 80  # characters of a value in a message


class _Repr(reprlib.Repr):
    """reprlib.Repr that can show huge integers, whose digits Python may refuse to print."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, MAX_LENGTH, MAX_LENGTH
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 4


def short_repr(value: object) -> str:
    """Repr of a value, shortened to about `MAX_LENGTH` characters."""
    return shorten(_REPR.repr(value), 2 * MAX_LENGTH)


def format_count(count: int, noun: str) -> str:
    """A count with its noun, which must have a regular plural: "1 image", "2 images"."""
    return f"{count} {noun}" + "s" * (count != 1)


def shorten(text: object, max_length: int = MAX_LENGTH) -> str:
    """Text on one line, with the middle replaced by "..." if it is longer than ``max_length`` characters."""
    line = " ".join(str(text)[: 100 * max_length].split())
    half = (max_length - 3) // 2
    return line if len(line) <= max_length else f"{line[:half]}...{line[-half:]}"
