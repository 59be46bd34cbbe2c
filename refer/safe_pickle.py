"""Read pickles of plain values only, so that a downloaded file cannot run code.

Most files are first checked, then read: if a regular expression finds that a file has only opcodes that build lists,
dictionaries, strings, numbers, booleans and None, the C unpickler reads it, six to ten times as fast as
`PlainUnpickler`. All other files (with tuples, sets, damage or attacks) are left to `PlainUnpickler`, which reads them
or reports what is wrong.
"""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

from .errors import ReferDataError
from .plain_files import read_bytes
from .plain_unpickler import PlainUnpickler, utf8_or_latin1

# Longest string in bytes that the regular expression matches, as it has an alternative for each length.
_MAX_LENGTH = 63


def _length_prefixed(opcode: bytes, width: int) -> bytes:
    """Regular expression for an opcode, a length in ``width`` bytes, and a string of that length (to `_MAX_LENGTH`)."""
    zeros = rb"\x00" * (width - 1)
    return opcode + b"(?:" + b"|".join(rb"\x%02x%b.{%d}" % (n, zeros, n) for n in range(_MAX_LENGTH + 1)) + b")"


# BINPUT, LONG_BINPUT, MEMOIZE, PUT. Indices are limited to nine million, as the C unpickler allocates its memo up to
# twice the largest index, however few are used.
_PUT = rb"(?:q.|r..[\x00-\x7f]\x00|\x94|p[1-8]?\d{1,6}\n)"
# At most 2000 opcodes in a match, as each uses memory until the match ends; `_is_simple` matches repeatedly.
_SIMPLE = re.compile(
    b"(?:"
    + b"|".join(
        (
            rb"[hK].",  # BINGET, BININT1
            _length_prefixed(b"X", 4) + _PUT + b"?",  # BINUNICODE
            _length_prefixed(rb"\x8c", 1) + _PUT + b"?",  # SHORT_BINUNICODE
            rb"[aeus(N\x88\x89]",  # APPEND, APPENDS, SETITEMS, SETITEM, MARK, NONE, NEWTRUE, NEWFALSE
            rb"[\]}ld]" + _PUT + b"?",  # EMPTY_LIST, EMPTY_DICT, LIST, DICT
            rb"j.{4}",  # LONG_BINGET
            rb"g\d{1,7}\n",  # GET
            # STRING in single quotes, UNICODE, STRING in double quotes; for speed, also the APPEND or SETITEM after it
            rb"(?:S'(?:[^'\\\n]|\\[^\n])*'\n|V[^\n]*\n|S\"(?:[^\"\\\n]|\\[^\n])*\"\n)" + _PUT + b"?[as]?",
            rb"M..",  # BININT2
            rb"J.{4}",  # BININT
            rb"I(?:0[01]?|-?[1-9]\d{0,17})\n",  # INT
            rb"L(?:0|-?[1-9]\d{0,17})L?\n",  # LONG
            rb"G.{8}",  # BINFLOAT
            _length_prefixed(b"U", 1) + _PUT + b"?",  # SHORT_BINSTRING
            rb"F-?\d{1,20}(?:\.\d{1,20})?(?:e[-+]?\d{1,3})?\n",  # FLOAT
            rb"\x8a(?:" + b"|".join(rb"\x%02x.{%d}" % (n, n) for n in range(9)) + b")",  # LONG1
            _PUT,
            rb"\x95.{8}",  # FRAME
            rb"\x80[\x00-\x05]",  # PROTO
        )
    )
    + b"){1,2000}",
    re.DOTALL,
)
_BYTE, _WORD = struct.Struct("<B"), struct.Struct("<I")
# Length fields of the strings that `_is_simple` skips, as `_SIMPLE` does not match them: BINSTRING, and BINUNICODE,
# SHORT_BINSTRING and SHORT_BINUNICODE that are too long for it.
_LENGTHS = {b"X": _WORD, b"T": _WORD, b"U": _BYTE, b"\x8c": _BYTE}
# Escaped surrogates, which 16-bit builds of Python 2 write in pairs for characters beyond U+FFFF. `PlainUnpickler`
# joins the pairs.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_plain_pickle(path: Path) -> Any:
    """Unpickle a file of lists, tuples, dictionaries, sets, numbers, strings, booleans and None.

    Args:
        path: the file.

    Returns:
        Its value.

    Raises:
        ReferNotFoundError: the file does not exist.
        ReferDataError: as `loads`; the message starts with the file.
    """
    try:
        return loads(read_bytes(path))
    except ReferDataError as error:
        text = str(error)
        raise ReferDataError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def loads(data: bytes) -> Any:
    """Unpickle plain values, written by Python 2 or 3.

    Byte strings of Python 2 are decoded as UTF-8, except for bytes that are invalid in it, which are latin-1.

    Args:
        data: the pickle.

    Returns:
        Its value.

    Raises:
        ReferDataError: the data is truncated, not a pickle, or contains anything else.
    """
    if _is_simple(data):
        try:
            return pickle.loads(data, encoding="utf-8", errors=utf8_or_latin1.__name__)
        except Exception:  # an invalid sequence of opcodes, which `PlainUnpickler` reports
            pass
    return PlainUnpickler(data).load()


def _is_simple(data: bytes) -> bool:
    """Whether the data consists only of opcodes that are harmless in the C unpickler."""
    if b"\\u" in data and _SURROGATE.search(data):
        return False
    position = 0
    while True:
        match = _SIMPLE.match(data, position)
        if match:
            position = match.end()
            continue
        opcode = data[position : position + 1]
        if opcode not in _LENGTHS:
            return opcode == b"."  # STOP; anything else is not simple
        # Skip a string; if it ends beyond the data, the next opcode is b"" and the result is False.
        length = _LENGTHS[opcode]
        position += 1
        if position + length.size > len(data):
            return False
        position += length.size + length.unpack_from(data, position)[0]
