"""`PlainUnpickler`: Python's own unpickler, restricted to the opcodes (see ``pickletools``) that build plain values."""

from __future__ import annotations

import codecs
import functools
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar

from .errors import ReferDataError

_SUPPORTED = "only lists, tuples, dictionaries, sets, numbers and strings are supported"
_SCALARS = (str, int, float, bytes, type(None))
_INTEGER = re.compile(rb"-?\d{1,19}")
_NAME = re.compile(r"[\w.]{1,80}", re.ASCII)
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_SETS = {(module, type_.__name__): type_ for module in ("builtins", "__builtin__") for type_ in (set, frozenset)}

_ALLOWED = (
    b"\x80\x95(012IJKLMNFGSTUVXBC\x88\x89\x8a\x8b\x8c\x8d\x8e])}lade0tuspqrghjciR.\x85\x86\x87\x8f\x90\x91\x93\x94"
)
_TEXT = b"VX\x8c\x8d"
# What an opcode stores, and what it hashes, as slices of the stack since the last mark.
_ALL, _TOP = slice(None), slice(-1, None)
_STORED = (
    dict.fromkeys(b"letdu", _ALL) | dict.fromkeys(b"as.\x85", _TOP) | {0x86: slice(-2, None), 0x87: slice(-3, None)}
)
_HASHED = dict.fromkeys(b"\x90\x91", _ALL) | dict.fromkeys(b"du", slice(None, None, 2)) | {ord("s"): slice(-2, -1)}


class PlainUnpickler(pickle._Unpickler):
    """Reads a pickle without importing anything, or calling anything but the set types.

    Based on Python's pure-Python unpickler, as the one in C allocates its memo up to twice the largest index. Nothing
    is allocated for a length or index without its bytes. Dictionary keys and set members must be scalars, as hashing
    nested tuples recurses without limit, and integers have at most 64 bits, as long ones can be chosen to have equal
    hashes.

    Args:
        data: the pickle.
    """

    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {code: pickle._Unpickler.dispatch[code] for code in _ALLOWED}

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self._members_left = len(data)
        super().__init__(self._file, encoding="utf-8", errors=utf8_or_latin1.__name__)

    def load(self) -> Any:
        """Return the value; raises ReferDataError with a one-line message for invalid data."""
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        while True:
            offset, code = self._file.tell(), self.read(1)[0]
            try:
                if code not in self.dispatch:
                    raise ReferDataError(_refusal_message(code, offset))
                # a set type, as `find_class` returns it, may be called but not stored
                if code in _STORED and functools.partial in map(type, self.stack[_STORED[code]]):
                    raise ReferDataError(f"contains a type as a value; {_SUPPORTED}")
                if code in _HASHED:
                    _check_scalars(self.stack[_HASHED[code]])
                if code == ord("."):
                    return self.stack.pop()
                self.dispatch[code](self)
                if code in _TEXT:
                    self.stack[-1] = _join_surrogates(self.stack[-1])
            except (ReferDataError, MemoryError):
                raise
            except Exception as error:  # invalid data can raise anything, such as an IndexError of the stack
                reason = f"{type(error).__name__} at byte {offset}, {_OPCODE_NAMES[code]}"
                raise ReferDataError(f"not a readable pickle ({reason}); download it again") from None

    def read(self, count: int) -> bytes:
        """Read exactly ``count`` bytes."""
        data = self._file.read(count)
        if len(data) < count:
            raise ReferDataError(f"{'truncated' if self._file.tell() else 'empty'} file; download it again")
        return data

    def readline(self) -> bytes:
        """Read a line with its end."""
        line = self._file.readline()
        return line if line.endswith(b"\n") else line + self.read(1)

    def find_class(self, module: str, name: str) -> Any:
        """Return a function that makes a set; raises ReferDataError for any other type."""
        if (module, name) not in _SETS:
            full = f"{module}.{name}"
            shown = full if _NAME.fullmatch(full) else ascii(full[:80])  # may contain control characters
            raise ReferDataError(f"asks for {shown}; {_SUPPORTED}")
        return functools.partial(self._make_set, _SETS[module, name])

    def _make_set(self, make: Callable[[Iterable[Any]], Any], members: Collection[Any] = ()) -> Any:
        # A set has a byte per member at least; more can only come from copying the same long list again and again.
        self._members_left -= len(members)
        if self._members_left < 0:
            raise ReferDataError("has more members of sets than bytes")
        return make(_check_scalars(members))

    def _load_frame(self) -> None:
        self.read(8)

    def _load_int(self) -> None:
        self.append(_parse_int(self.readline()[:-1]))

    def _load_long1(self) -> None:
        self.append(_parse_long(self.read(self.read(1)[0])))

    def _load_long4(self) -> None:
        self.append(_parse_long(self.read(int.from_bytes(self.read(4), "little"))))

    def _load_put(self) -> None:
        self.memo[_parse_int(self.readline()[:-1])] = self.stack[-1]

    def _load_get(self) -> None:
        self.append(self.memo[_parse_int(self.readline()[:-1])])

    dispatch |= {0x95: _load_frame, ord("I"): _load_int, ord("L"): _load_int, 0x8A: _load_long1, 0x8B: _load_long4}
    dispatch |= {ord("p"): _load_put, ord("g"): _load_get}


def utf8_or_latin1(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler that decodes invalid UTF-8 bytes as latin-1."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error(utf8_or_latin1.__name__, utf8_or_latin1)


def _check_scalars(values: Collection[Any]) -> Collection[Any]:
    """Return dictionary keys or set members; raises ReferDataError if one is not a number or string."""
    for value in values:
        if not isinstance(value, _SCALARS):
            raise ReferDataError(
                f"has a {type(value).__name__} as dictionary key or set member; only numbers and strings are supported"
            )
    return values


def _join_surrogates(text: str) -> str:
    """Join surrogate pairs; Python 2 may have written characters beyond 16 bits as such."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ReferDataError(f"unpaired surrogate in string {ascii(text[:40])}") from None


def _parse_int(line: bytes) -> int:
    """Parse a line of digits, maybe with an "L" at its end; raises ReferDataError if it is no 64-bit integer."""
    if line in (b"00", b"01"):  # booleans in protocol 0
        return line == b"01"
    line = line.removesuffix(b"L")
    if _INTEGER.fullmatch(line):
        return int(line)
    if line.strip(b"-").isdigit():
        raise ReferDataError("has an integer of more than 64 bits")
    raise ReferDataError(f"has an invalid integer: {line[:20]!a}")


def _parse_long(data: bytes) -> int:
    """Parse a little-endian integer; raises ReferDataError if it has more than 64 bits."""
    if len(data) > 8:
        raise ReferDataError(f"has an integer of {8 * len(data)} bits; at most 64 are supported")
    return int.from_bytes(data, "little", signed=True)


def _refusal_message(code: int, offset: int) -> str:
    """Error message for an opcode that is unknown or not allowed."""
    if code not in _OPCODE_NAMES:
        return f"not a readable pickle (unknown opcode {code:#04x} at byte {offset}); download it again"
    return f"asks for an object by the opcode {_OPCODE_NAMES[code]} at byte {offset}; {_SUPPORTED}"
