"""Check a torch.save file before torch.load, so that loading takes time and memory in proportion to its size.

torch.load with ``weights_only`` runs no code from the file, but unpacks, builds and hashes whatever it describes, which
may be far larger than the file itself.
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

MAX_OPCODES = 400_000  # of a pickle; a ResNet-152 has 40,000
MAX_VALUES = 10_000_000  # counting shared values each time
MAX_DIRECTORY_BYTES = 2**24  # of a zip's central directory
LEGACY_PICKLES = 5  # magic number, version, system, tensors, keys of the storages
_NEEDS_CODE = "which cannot be read without running code from it; save the model's state_dict"
TORCHSCRIPT, OLD_TAR = f"a TorchScript archive, {_NEEDS_CODE}", f"a tar archive of PyTorch before 0.2, {_NEEDS_CODE}"
DAMAGED = "damaged, or not written by torch.save"
# modules whose classes torch.load checks itself; from others it would also load non-tensors such as bytearray
_CHECKED_BY_TORCH = ("torch", "collections")
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}
_BUILTIN_TYPES = ("set", "frozenset", "complex", "bytearray", "object", "slice", "range")
_BUILTINS = ("__builtin__", "builtins")


@dataclass
class Contents:
    """Names in the pickles of a file.

    Attributes:
        strings: short strings, including the names of tensors.
        classes: dotted names of the imports.
    """

    strings: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    @property
    def unsafe_class(self) -> str | None:
        """The first class that is not part of a tensor, as torch would name it; None if there is none."""
        names = [_without_builtins(name.lstrip(".")) for name in self.classes if _is_suspicious(name)]
        return min(names, key=lambda name: name in _BUILTIN_TYPES, default=None)  # those say least about the file


def read_contents(path: Path) -> Contents:
    """Check that a torch.save file is safe to load, and list the names in it.

    Raises:
        InputError: the file would expand far beyond its size, as it is compressed or repeats itself; or it is damaged.
            The message has no file name.
    """
    contents = Contents()
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _scan(BoundedReader(io.BytesIO(_pickle_of_zip(path, file))), contents)
            return contents
        file.seek(0)
        limited = BoundedReader(file)
        for _ in range(LEGACY_PICKLES):
            if not limited.left or not _scan(limited, contents):
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
    """Scan one pickle without building anything; False if it ended early after a refused class."""
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
                contents.classes.append(text.replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":  # named by the last two strings, unless those are in the memo
                contents.classes.append(".".join(["", *contents.strings[-2:]]))
    except InputError:
        raise
    except Exception as error:  # pickletools can raise anything on a damaged pickle
        if contents.unsafe_class:
            return False
        raise InputError(f"{DAMAGED} ({shorten(error)})") from None
    return True


class _ValueCounts:
    """Number of values in each item on the stack of an unpickler, counting shared values each time.

    Nested tuples that each hold the next one twice are small in memory, but take exponential time to hash.
    """

    def __init__(self) -> None:
        self.stack: list[int | None] = []  # None is a mark
        self.memo: dict[Any, int] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Apply one instruction to the stack."""
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if argument is not None and not 0 <= argument < MAX_OPCODES:  # the memo would grow to this length
                raise InputError(f"{DAMAGED}: its pickle has an entry {argument} in its memo")
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1] or 0
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
    """Check that every zip reader would find the same central directory, of limited size; returns the file's size."""
    size = file.seek(0, io.SEEK_END)
    end = size - 22
    file.seek(max(end - 20, 0))
    tail = file.read()
    record = tail[-22:]
    if len(record) < 22 or record[:4] != b"PK\x05\x06" or record[-2:] != b"\0\0":
        raise InputError(f"{DAMAGED} (the zip does not end with its directory)")
    length, start = struct.unpack("<II", record[12:20])
    if tail[:4] == b"PK\x06\x07" and len(tail) == 42:  # the locator of a zip64 record
        (end,) = struct.unpack("<Q", tail[8:16])
        file.seek(min(end, size))
        large = file.read(56)
        if len(large) < 56 or large[:4] != b"PK\x06\x06":
            raise InputError(f"{DAMAGED} (the zip does not end with its directory)")
        length, start = struct.unpack("<QQ", large[40:56])
    if start + length != end or length > MAX_DIRECTORY_BYTES:
        raise InputError(f"{DAMAGED} (the zip's directory is not where it should be, or too large)")
    return size


def _is_suspicious(name: str) -> bool:
    if name.startswith("torch.nn."):
        return name != "torch.nn.parameter.Parameter"
    return name.partition(".")[0] not in _CHECKED_BY_TORCH


def _without_builtins(name: str) -> str:
    module, _, rest = name.partition(".")
    return rest if module in _BUILTINS else name
