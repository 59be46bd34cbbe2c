"""Shorten values and text to fit in a one-line error message."""

from __future__ import annotations

import reprlib

LONGEST = 80  # characters of a value in a message


class _Repr(reprlib.Repr):
    """reprlib.Repr that can show huge integers, whose digits Python may refuse to print."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, LONGEST, LONGEST
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 4


def shown(value: object) -> str:
    """Repr of a value, shortened to about `LONGEST` characters."""
    return cut(_REPR.repr(value), 2 * LONGEST)


def counted(n: int, noun: str) -> str:
    """A count with its noun: "1 image", "2 images". For nouns with a regular plural."""
    return f"{n} {noun}" + "s" * (n != 1)


def cut(text: object, longest: int = LONGEST) -> str:
    """Text on one line, with the middle replaced by "..." if it is longer than ``longest`` characters."""
    line = " ".join(str(text)[: 100 * longest].split())
    half = (longest - 3) // 2
    return line if len(line) <= longest else f"{line[:half]}...{line[-half:]}"
