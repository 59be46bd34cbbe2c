"""Check a torch.save file before torch.load, so that loading takes time and memory in proportion to its size.

torch.load with ``weights_only`` runs no code from the file, but unpacks, builds and hashes whatever it describes, which
may be far larger than the file itself.

A pickle imports *globals*, that is, classes and functions. This module calls a global *unsafe* unless it is one of
those that torch.load itself checks.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from refdet.errors import InputError
from refdet.files.short_text import shorten

MAX_OPCODES = 400_000  # of a pickle; that of a ResNet-152 has 40,000
MAX_VALUES = 10_000_000  # in the object that a pickle describes, where a value referenced n times counts n times
MAX_DIRECTORY_BYTES = 2**24  # of a zip's central directory
LEGACY_PICKLES = 5  # in a file before PyTorch 1.6: magic number, version, system, state dict, keys of the storages
_NEEDS_CODE = "which cannot be read without running code from it; save the model's state_dict"
TORCHSCRIPT, OLD_TAR = f"a TorchScript archive, {_NEEDS_CODE}", f"a tar archive of PyTorch before 0.2, {_NEEDS_CODE}"
DAMAGED = "damaged, or not written by torch.save"
# Top-level modules whose globals are left to torch.load, which allows a fixed list of them. From other modules it also
# allows some that are not part of a tensor, such as bytearray.
_CHECKED_BY_TORCH = ("torch", "collections")
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}
_BUILTIN_TYPES = ("set", "frozenset", "complex", "bytearray", "object", "slice", "range")
_BUILTINS = ("__builtin__", "builtins")
# records at the end of a zip, after their signatures
_END_OF_DIRECTORY = struct.Struct("<4x8xIIH")  # size and offset of the central directory, length of a comment
_ZIP64_LOCATOR = struct.Struct("<4x4xQ4x")  # offset of the zip64 record
_ZIP64_END_OF_DIRECTORY = struct.Struct("<4x36xQQ")  # size and offset of the central directory


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle imports.

    Attributes:
        name: dotted name.
        guessed: whether the name may be wrong, as the pickle takes it from its stack.
    """

    name: str
    guessed: bool = False

    @property
    def is_unsafe(self) -> bool:
        """Whether it is not one of those that torch.load itself checks; true for all guessed names.

        PyTorch's layers count as unsafe, so that a whole pickled model is reported by the name of its first layer.
        """
        if self.guessed or self.name.partition(".")[0] not in _CHECKED_BY_TORCH:
            return True
        return self.name.startswith("torch.nn.") and self.name != "torch.nn.parameter.Parameter"


@dataclass
class Contents:
    """Names in the pickles of a file.

    Attributes:
        strings: short strings, including the names of tensors.
        globals: the globals that the pickles import.
    """

    strings: list[str] = field(default_factory=list)
    globals: list[Global] = field(default_factory=list)

    @property
    def unsafe_global(self) -> str | None:
        """The unsafe global to report, as torch would name it; None if there is none.

        This is the first one, but a builtin type only if there is no other, as it says least about the file.
        """
        names = [_without_builtins(imported.name) for imported in self.globals if imported.is_unsafe]
        return min(names, key=lambda name: name in _BUILTIN_TYPES, default=None)


def read_contents(path: Path) -> Contents:
    """Check that a torch.save file is not damaged and does not expand far beyond its size, and list the names in it.

    Unsafe globals are listed, but are not an error here.

    Raises:
        InputError: the file is damaged, compressed or repeats itself. The message has no file name.
    """
    contents = Contents()
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _scan(BoundedReader(io.BytesIO(_pickle_of_zip(path, file))), contents)
            return contents
        file.seek(0)
        reader = BoundedReader(file)
        for _ in range(LEGACY_PICKLES):
            if not reader.left or not _scan(reader, contents):
                break
    return contents


class BoundedReader:
    """A file whose `read` allocates no more than the remaining bytes.

    Attributes:
        left: number of remaining bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        self.left = file.seek(0, io.SEEK_END) - start
        file.seek(start)

    def read(self, count: int) -> bytes:
        """Read at most `count` bytes."""
        data = self._file.read(min(count, self.left))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        """Read a line."""
        data = self._file.readline()
        self.left -= len(data)
        return data


def _scan(file: BoundedReader, contents: Contents) -> bool:
    """Scan one pickle without building anything, and add its names to `contents`.

    Returns:
        Whether the scan reached the end; False if the pickle is malformed after an unsafe global, which is then the
        better error to report.
    """
    value_counts = _ValueCounts()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
            if number >= MAX_OPCODES:
                raise InputError(f"{DAMAGED}: its pickle has more than {MAX_OPCODES} instructions")
            value_counts.step(opcode, argument)
            text = argument if isinstance(argument, str) else ""
            if opcode.name in _STRINGS and len(text) <= 300:
                contents.strings.append(text)
            elif opcode.name in ("GLOBAL", "INST"):
                contents.globals.append(Global(text.replace(" ", ".")))
            elif opcode.name == "STACK_GLOBAL":  # torch.save does not use it; module and name may come from the memo
                contents.globals.append(Global(".".join(contents.strings[-2:]), guessed=True))
    except InputError:
        raise
    except Exception as error:  # pickletools can raise anything on a damaged pickle
        if contents.unsafe_global:
            return False
        raise InputError(f"{DAMAGED} ({shorten(error)})") from None
    return True


class _ValueCounts:
    """Number of values in each item on the stack of an unpickler, where a value referenced n times counts n times.

    Nested tuples that each hold the next one twice are small in memory, but take exponential time to hash.
    """

    def __init__(self) -> None:
        self.stack: list[int | None] = []  # None is a mark
        self.memo: dict[Any, int] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Apply one instruction to the stack."""
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            # the C unpickler's memo is an array, which would grow to this length
            if argument is not None and not 0 <= argument < MAX_OPCODES:
                raise InputError(f"{DAMAGED}: its pickle has an entry {argument} in its memo")
            position = len(self.memo) if name == "MEMOIZE" else argument
            self.memo[position] = self.stack[-1] or 0  # a mark has no values
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo.get(argument, 1))
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "MARK":
            self.stack.append(None)
        else:
            taken = self._take(opcode)
            if taken > MAX_VALUES:
                raise InputError(f"{DAMAGED}: it repeats itself, to more than {MAX_VALUES} values")
            self.stack += [1 + taken] * len(opcode.stack_after)

    def _take(self, opcode: pickletools.OpcodeInfo) -> int:
        """Pop the arguments of an instruction; returns their number of values."""
        before = [kind.name for kind in opcode.stack_before]
        total = 0
        if "mark" in before:
            while (count := self.stack.pop()) is not None:
                total += count
            before = before[: before.index("mark")]
        for _ in before:
            total += self.stack.pop() or 0
        return total


def _pickle_of_zip(path: Path, file: BinaryIO) -> bytes:
    """``data.pkl`` of a zip whose members are uncompressed, disjoint and unique, as torch.save writes them."""
    size = _check_directory(file)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.filename.endswith("/constants.pkl") for member in members):
                raise InputError(TORCHSCRIPT)
            if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
                raise InputError(f"{DAMAGED}: a member of the zip is compressed, which torch.save does not do")
            names = {member.filename for member in members}
            if len(names) < len(members) or sum(member.file_size for member in members) > size:
                raise InputError(f"{DAMAGED}: duplicate or overlapping members in the zip")
            pickles = [name for name in names if name.partition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise InputError(f"{DAMAGED} (no data.pkl in the zip)")
            return archive.read(pickles[0])
    except InputError:
        raise
    except Exception as error:  # zipfile can raise anything on a damaged zip
        raise InputError(f"{DAMAGED} ({shorten(error) or type(error).__name__})") from None


def _check_directory(file: BinaryIO) -> int:
    """Check that every zip reader would find the same central directory, of limited size; returns the file's size.

    Readers search for the directory in different ways. They agree if the file has no comment and the directory ends
    where the records about it begin.
    """
    size = file.seek(0, io.SEEK_END)
    directory_end = size - _END_OF_DIRECTORY.size
    record = _read_record(file, directory_end, _END_OF_DIRECTORY, b"PK\x05\x06")
    if record is None or record[2] != 0:
        raise InputError(f"{DAMAGED} (the zip does not end with its directory)")
    length, start, _ = record
    locator = _read_record(file, directory_end - _ZIP64_LOCATOR.size, _ZIP64_LOCATOR, b"PK\x06\x07")
    if locator is not None:
        (directory_end,) = locator
        record = _read_record(file, directory_end, _ZIP64_END_OF_DIRECTORY, b"PK\x06\x06")
        if record is None:
            raise InputError(f"{DAMAGED} (the zip does not end with its directory)")
        length, start = record
    if start + length != directory_end or length > MAX_DIRECTORY_BYTES:
        raise InputError(f"{DAMAGED} (the zip's directory is not where it should be, or too large)")
    return size


def _read_record(file: BinaryIO, offset: int, layout: struct.Struct, signature: bytes) -> tuple[int, ...] | None:
    """The fields of a zip's record; None if there is no such record at the offset."""
    if not 0 <= offset <= file.seek(0, io.SEEK_END) - layout.size:
        return None
    file.seek(offset)
    data = file.read(layout.size)
    return layout.unpack(data) if data.startswith(signature) else None


def _without_builtins(name: str) -> str:
    """A global's name as torch gives it: "bytearray" for "builtins.bytearray"."""
    module, _, rest = name.partition(".")
    return rest if module in _BUILTINS else name
