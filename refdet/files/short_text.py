"""Short forms of values, text, counts and sizes for one-line messages."""

from __future__ import annotations

import reprlib

MAX_LENGTH = 80  # characters of a value in a message


_PLURAL_VERBS = {"is": "are", "was": "were", "has": "have", "does": "do"}  # other verbs lose their s


class _Repr(reprlib.Repr):
    """reprlib.Repr that can show huge integers; Python refuses to print more than 4300 digits."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, MAX_LENGTH, MAX_LENGTH
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 4


def short_repr(value: object) -> str:
    """Repr of a value, with each item shortened to about `MAX_LENGTH` characters, and all of it to twice as many."""
    return shorten(_REPR.repr(value), 2 * MAX_LENGTH)


def format_count(count: int, noun: str, verb: str = "", spec: str = "") -> str:
    """A count with its noun and verb: "1 image is", "2 images are".

    Args:
        count: the number.
        noun: in the singular; its plural must be regular, such as "images", "boxes" or "categories".
        verb: in the singular, such as "is", "has" or "lies"; "" for no verb.
        spec: format of the number, such as ",".
    """
    return f"{count:{spec}} {noun if count == 1 else _plural(noun)}" + (f" {agree(count, verb)}" if verb else "")


def format_share(count: int, total: int, noun: str, verb: str = "") -> str:
    """A count out of a total, with a verb: "1 of 3 images is", "2 of 3 images are"; see `format_count`."""
    return f"{count} of {format_count(total, noun)}" + (f" {agree(count, verb)}" if verb else "")


def agree(count: int, verb: str) -> str:
    """A verb, given in the singular, that agrees with a count: "is" or "are"."""
    return verb if count == 1 else _PLURAL_VERBS.get(verb, verb.removesuffix("s"))


def format_bytes(number: int) -> str:
    """Human-readable size, such as "13.5 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return format_count(number, "byte")


def format_missing_space(needed: int, free: int) -> str:
    """The needed disk space, and how much of it is missing, given in bytes: "13.5 GB, 2.1 GB more than is free"."""
    return f"{format_bytes(needed)}, {format_bytes(needed - free)} more than is free"


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def shorten(text: object, max_length: int = MAX_LENGTH) -> str:
    """Text on one line, with the middle replaced by "..." if it is longer than ``max_length`` characters."""
    line = " ".join(str(text)[: 100 * max_length].split())  # cut first, as the text may have megabytes
    half = (max_length - 3) // 2
    return line if len(line) <= max_length else f"{line[:half]}...{line[-half:]}"
