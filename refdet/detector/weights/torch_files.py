"""Checks of a file of torch.save before torch reads it: what reading it takes is in proportion to its size.

torch's reader with ``weights_only`` runs nothing of a file's own. It unpacks, builds and hashes whatever the file asks
for, though, and that may be far larger than the file.
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
from refdet.files.short_text import cut

MOST_OPCODES = 400_000  # of a pickle; the state of a ResNet-152 takes 40,000
MOST_VALUES = 10_000_000  # with what is shared counted each time
LARGEST_DIRECTORY = 2**24  # bytes of a zip's list of members
LEGACY_PICKLES = 5  # magic number, version, system, tensors, keys of the storages
_NOT_RUN = "which cannot be read without running what is in it; save the model's state_dict"
SCRIPT, TAR = f"a TorchScript archive, {_NOT_RUN}", f"a tar archive of PyTorch before 0.2, {_NOT_RUN}"
DAMAGED = "damaged, or not a file of torch.save"
# modules of which torch's reader decides itself; of others it would load what is no tensor, such as a bytearray
_LEFT_TO_TORCH = ("torch", "collections")
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}
_PLAIN = ("set", "frozenset", "complex", "bytearray", "object", "slice", "range")
_BUILTINS = ("__builtin__", "builtins")


@dataclass
class Contents:
    """What the pickles of a file speak of.

    Attributes:
        strings: the short ones, the names of tensors among them.
        classes: dotted names of what it wants to import.
    """

    strings: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> str | None:
        """The first class that is neither a tensor nor a part of one, as torch would name it."""
        strange = [name.lstrip(".") for name in self.classes if _is_strange(name)]
        strange.sort(key=lambda name: _without_builtins(name) in _PLAIN)  # says less than a class of a program
        return _without_builtins(strange[0]) if strange else None


def read_contents(path: Path) -> Contents:
    """What a file of torch.save speaks of, once it is seen to be harmless to read.

    Raises:
        InputError: it is packed or repeats itself, so that it would become far larger than it is; or it is damaged.
            The message names no file.
    """
    found = Contents()
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _scan(_Limited(io.BytesIO(_pickle_of_zip(path, file))), found)
            return found
        file.seek(0)
        limited = _Limited(file)
        for _ in range(LEGACY_PICKLES):
            if not limited.left or not _scan(limited, found):
                break
    return found


class _Limited:
    """A file whose `read` never makes room for more than there is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        self.left = file.seek(0, io.SEEK_END) - start
        file.seek(start)

    def read(self, count: int) -> bytes:
        data = self._file.read(min(count, self.left))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline()
        self.left -= len(data)
        return data


def _scan(file: _Limited, found: Contents) -> bool:
    """Go through one pickle without building anything; whether it ended, and was no strange one."""
    weights = _Weights()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
            if number >= MOST_OPCODES:
                raise InputError(f"{DAMAGED}: its pickle is of more than {MOST_OPCODES} instructions")
            weights.step(opcode, argument)
            text = argument if isinstance(argument, str) else ""
            if opcode.name in _STRINGS and len(text) <= 300:
                found.strings.append(text)
            elif opcode.name in ("GLOBAL", "INST"):
                found.classes.append(text.replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":  # of the two strings before it, if they are not taken from the memo
                found.classes.append(".".join(["", *found.strings[-2:]]))
    except InputError:
        raise
    except Exception as error:  # what damaged opcodes make of pickletools is anything
        if found.refused:
            return False
        raise InputError(f"{DAMAGED} ({cut(error)})") from None
    return True


class _Weights:
    """How many values each thing on the stack of a pickle is, counting what is shared wherever it stands.

    Tuples that hold one tuple twice, which holds one twice, and so on, are small in memory; their hash takes for ever.
    """

    def __init__(self) -> None:
        self.stack: list[int | None] = []  # None is a mark
        self.memo: dict[Any, int] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """What one instruction does to the stack."""
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1] or 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo.get(argument, 1))
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "MARK":
            self.stack.append(None)
        else:
            taken = self._take(opcode)
            if taken > MOST_VALUES:
                raise InputError(f"{DAMAGED}: it repeats itself, to more than {MOST_VALUES} values")
            self.stack += [1 + taken] * len(opcode.stack_after)

    def _take(self, opcode: pickletools.OpcodeInfo) -> int:
        before = [kind.name for kind in opcode.stack_before]
        total = 0
        if "mark" in before:
            while (weight := self.stack.pop()) is not None:
                total += weight
            before = before[: before.index("mark")]
        for _ in before:
            total += self.stack.pop() or 0
        return total


def _pickle_of_zip(path: Path, file: BinaryIO) -> bytes:
    """``data.pkl`` of a zip whose members are as torch.save stores them: unpacked, apart, each once."""
    size = _check_directory(file)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.filename.endswith("/constants.pkl") for member in members):
                raise InputError(SCRIPT)
            if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
                raise InputError(f"{DAMAGED}: a member of the zip is packed, which torch.save does not do")
            names = {member.filename for member in members}
            if len(names) < len(members) or sum(member.file_size for member in members) > size:
                raise InputError(f"{DAMAGED}: members of the zip are there twice")
            pickles = [name for name in names if name.partition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise InputError(f"{DAMAGED} (no data.pkl in the zip)")
            return archive.read(pickles[0])
    except InputError:
        raise
    except Exception as error:  # what a damaged zip makes of zipfile is anything
        raise InputError(f"{DAMAGED} ({cut(error) or type(error).__name__})") from None


def _check_directory(file: BinaryIO) -> int:
    """See that a zip's directory is where every reader finds the same one, and not huge. Returns the file's size."""
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
    if start + length != end or length > LARGEST_DIRECTORY:
        raise InputError(f"{DAMAGED} (the zip's directory is not where it should be, or too large)")
    return size


def _is_strange(name: str) -> bool:
    if name.startswith("torch.nn."):
        return name != "torch.nn.parameter.Parameter"
    return name.partition(".")[0] not in _LEFT_TO_TORCH


def _without_builtins(name: str) -> str:
    module, _, rest = name.partition(".")
    return rest if module in _BUILTINS else name
