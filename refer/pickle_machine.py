"""`Machine`: a Python interpreter of the pickle opcodes (see ``pickletools``) that build plain values."""

from __future__ import annotations

import codecs
import pickletools
import re
import struct
from collections.abc import Callable, Collection, Iterable
from typing import Any

from .errors import ReferDataError

_ONLY = "only lists, tuples, dictionaries, sets, numbers and strings are supported"
_SCALARS = (str, int, float, bytes, type(None))
_INTEGER = re.compile(rb"-?\d{1,19}")
_OPCODES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_NAME = re.compile(r"[\w.]{1,80}", re.ASCII)


class _SetType:
    """Stands for the type that is called to create a set, in Python 2 and before protocol 4."""

    def __init__(self, make: Callable[[Iterable[Any]], Any]) -> None:
        self.make = make


_SETS = {(m, make.__name__): _SetType(make) for m in ("builtins", "__builtin__") for make in (set, frozenset)}


class Machine:
    """Reads a pickle with a stack and a memo, and without any opcode that could import or call something.

    Nothing is allocated for a length or index without its bytes. Dictionary keys and set members must be scalars, as
    hashing nested tuples recurses without limit, and integers have at most 64 bits, as long ones can be chosen to have
    equal hashes.

    Args:
        data: the pickle.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []  # lengths of the stack
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Return the value; raises ReferDataError with a one-line message for invalid data."""
        while True:
            at, opcode = self._position, self._take(1)
            try:
                if opcode == b".":
                    return _plain([self._pop()])[0]
                action = _ACTIONS.get(opcode)
                if action is None:
                    raise ReferDataError(_refusal(opcode, at))
                action(self)
            except (ReferDataError, MemoryError):
                raise
            except Exception as error:  # invalid data can raise anything, such as a KeyError of the memo
                reason = f"{type(error).__name__} at byte {at}, {_opcode_name(opcode)}"
                raise ReferDataError(f"not a readable pickle ({reason}); download it again") from None

    def _take(self, count: int) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._data):
            raise ReferDataError(f"{'truncated' if self._data else 'empty'} file; download it again")
        return self._data[start : self._position]

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._position)
        return self._take((end if end >= 0 else len(self._data)) + 1 - self._position)[:-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise IndexError("mark instead of a value")
        return self._stack.pop()

    def _discard(self) -> None:
        if self._marks and len(self._stack) == self._marks[-1]:
            self._marks.pop()
        else:
            self._stack.pop()

    def _items(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return _plain(items)

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise TypeError(f"not a {kind.__name__}")
        return self._stack[-1]

    def _append(self) -> None:
        items = _plain([self._pop()])
        self._top(list).extend(items)

    def _set_item(self) -> None:
        items = _plain([self._pop(), self._pop()])[::-1]
        self._top(dict).update(_dict(items))

    def _extend(self) -> None:
        items = self._items()
        self._top(list).extend(items)

    def _update(self) -> None:
        items = self._items()
        self._top(dict).update(_dict(items))

    def _add(self) -> None:
        items = self._items()
        self._top(set).update(_scalars(items))

    def _tuple(self, size: int) -> None:
        self._push(tuple(_plain([self._pop() for _ in range(size)][::-1])))

    def _memoize(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("name is not a string")
        if (module, name) not in _SETS:
            raise ReferDataError(f"asks for {_shown(f'{module}.{name}')}; {_ONLY}")
        self._push(_SETS[module, name])

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _instance(self) -> None:
        module, name = (self._line().decode("latin-1") for _ in range(2))
        raise ReferDataError(f"asks for {_shown(f'{module}.{name}')}; {_ONLY}")

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        if type(called) is not _SetType or type(arguments) is not tuple or len(arguments) > 1:
            raise TypeError("call of something else than a set")
        members = arguments[0] if arguments else []
        if not isinstance(members, list | tuple | set | frozenset):
            raise TypeError("set of something else than a list")
        self._push(called.make(_scalars(members)))


def utf8_or_latin1(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler that decodes invalid UTF-8 bytes as latin-1."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


def _plain(values: list[Any]) -> list[Any]:
    for value in values:
        if type(value) is _SetType:
            raise ReferDataError(f"contains a type as a value; {_ONLY}")
    return values


def _scalars(values: Collection[Any]) -> Collection[Any]:
    for value in values:
        if not isinstance(value, _SCALARS):
            raise ReferDataError(
                f"has a {type(value).__name__} as dictionary key or set member; only numbers and strings are supported"
            )
    return values


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(_scalars(items[::2]), items[1::2], strict=True))


def _text(data: bytes, encoding: str, errors: str) -> str:
    text = data.decode(encoding, errors)
    if text.isascii():
        return text
    try:  # Python 2 may have written a character beyond 16 bits as a surrogate pair
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ReferDataError(f"unpaired surrogate in string {ascii(text[:40])}") from None


def _unicode(data: bytes) -> str:
    return _text(data, "utf-8", "surrogatepass")


def _bytes(data: bytes) -> str:
    return _text(data, "utf-8", utf8_or_latin1.__name__)


def _quoted(line: bytes) -> str:
    line = line.strip()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise ValueError("string without quotes")
    return _bytes(codecs.escape_decode(line[1:-1])[0])


def _int(line: bytes) -> int:
    if line in (b"00", b"01"):  # booleans in protocol 0
        return line == b"01"
    line = line.removesuffix(b"L")
    if not _INTEGER.fullmatch(line):
        raise ReferDataError(
            "has an integer of more than 64 bits"
            if line.strip(b"-").isdigit()
            else f"has an invalid integer: {line[:20]!a}"
        )
    return int(line)


def _long(data: bytes) -> int:
    if len(data) > 8:
        raise ReferDataError(f"has an integer of {8 * len(data)} bits; at most 64 are supported")
    return int.from_bytes(data, "little", signed=True)


def _shown(name: str) -> str:
    return name if _NAME.fullmatch(name) else ascii(name[:80])  # may contain control characters


def _opcode_name(opcode: bytes) -> str:
    return _OPCODES.get(opcode.decode("latin-1"), f"unknown opcode {opcode[0]:#04x}")


def _refusal(opcode: bytes, at: int) -> str:
    name = _opcode_name(opcode)
    if opcode.decode("latin-1") not in _OPCODES:
        return f"not a readable pickle ({name} at byte {at}); download it again"
    return f"asks for an object by the opcode {name} at byte {at}; {_ONLY}"


_Action = Callable[[Machine], object]


def _number(layout: str) -> _Action:
    number = struct.Struct(layout)
    return lambda m: m._push(number.unpack(m._take(number.size))[0])


def _counted(width: int, read: Callable[[bytes], Any]) -> _Action:
    return lambda m: m._push(read(m._take(m._number(width))))


def _on_line(read: Callable[[bytes], Any]) -> _Action:
    return lambda m: m._push(read(m._line()))


def _new(make: Callable[[], Any]) -> _Action:
    return lambda m: m._push(make())


# fmt: off
_ACTIONS: dict[bytes, _Action] = {
    b"\x80": lambda m: m._take(1), b"\x95": lambda m: m._take(8),  # PROTO, FRAME
    b"(": lambda m: m._marks.append(len(m._stack)), b"0": Machine._discard, b"1": lambda m: m._items(),
    b"2": lambda m: m._push(m._stack[-1]),
    b"N": _new(lambda: None), b"\x88": _new(lambda: True), b"\x89": _new(lambda: False),
    b"I": _on_line(_int), b"L": _on_line(_int), b"J": _number("<i"), b"K": _number("<B"), b"M": _number("<H"),
    b"\x8a": _counted(1, _long), b"\x8b": _counted(4, _long),
    b"F": _on_line(float), b"G": _number(">d"),
    b"S": _on_line(_quoted), b"T": _counted(4, _bytes), b"U": _counted(1, _bytes),
    b"V": _on_line(lambda line: _text(line, "raw-unicode-escape", "strict")),
    b"X": _counted(4, _unicode), b"\x8c": _counted(1, _unicode), b"\x8d": _counted(8, _unicode),
    b"B": _counted(4, bytes), b"C": _counted(1, bytes), b"\x8e": _counted(8, bytes),
    b"]": _new(list), b"l": lambda m: m._push(m._items()), b"a": Machine._append, b"e": Machine._extend,
    b"}": _new(dict), b"d": lambda m: m._push(_dict(m._items())), b"s": Machine._set_item, b"u": Machine._update,
    b")": _new(tuple), b"t": lambda m: m._push(tuple(m._items())),
    b"\x85": lambda m: m._tuple(1), b"\x86": lambda m: m._tuple(2), b"\x87": lambda m: m._tuple(3),
    b"\x8f": _new(set), b"\x90": Machine._add, b"\x91": lambda m: m._push(frozenset(_scalars(m._items()))),
    b"p": lambda m: m._memoize(_int(m._line())), b"q": lambda m: m._memoize(m._number(1)),
    b"r": lambda m: m._memoize(m._number(4)), b"\x94": lambda m: m._memoize(len(m._memo)),
    b"g": lambda m: m._push(m._memo[_int(m._line())]), b"h": lambda m: m._push(m._memo[m._number(1)]),
    b"j": lambda m: m._push(m._memo[m._number(4)]),
    b"c": lambda m: m._global(m._line().decode("latin-1"), m._line().decode("latin-1")),
    b"\x93": Machine._stack_global, b"i": Machine._instance, b"R": Machine._reduce,
}
# fmt: on
codecs.register_error(utf8_or_latin1.__name__, utf8_or_latin1)
