"""What a file given as weights is, told from its first bytes; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import cut
from refdet.files.small_files import strict_json
from refdet.files.weight_programs import OWN, STATE, has_all, program_of

LARGEST_HEADER = 2**24  # bytes of the header of a safetensors file
MOST_TENSORS = 20_000  # in a file; a ResNet-152 with its momentum has 1,400
_HDF5 = b"\x89HDF\r\n\x1a\n"
_GUESS = 2**20  # bytes that are looked at to tell JSON files apart


def what_is(path: Path) -> str | None:
    """What a file is, with where it belongs if it is one of refdet's; None where nothing tells."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(_GUESS)
    if start.startswith(_HDF5):
        return "an HDF5 file, as a store of features is"
    if is_safetensors(start):
        return _what_tensors(path)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        kind = "a zip file" if start.startswith(b"PK") and b"data.pkl" not in start[:_GUESS] else "a PyTorch checkpoint"
        return f"{kind} (refdet import-weights makes a run directory of weights that it knows)"
    if start.lstrip()[:1] in (b"{", b"["):
        if b'"images"' in start or b'"annotations"' in start:
            return "a COCO instances file (it belongs to --instances)"
        return "a JSON file"
    return None


def _what_tensors(path: Path) -> str:
    try:
        names = [name for name in header(path) if name != "__metadata__"]
    except InputError:
        return "a damaged safetensors file"
    if has_all(names, STATE):
        return "the state of a training (its run directory is the folder above state/)"
    if has_all(names, OWN):
        return "the weights of a run directory (give the folder that holds them and their model.json)"
    known = program_of(names) or "weights of another program"
    return f"{known} (refdet import-weights makes a run directory of weights that it knows)"


def is_address(path: Path) -> bool:
    """Whether it is no path but an address of the web, whose two slashes a path has made one."""
    return path.parts[:1] in (("http:",), ("https:",), ("s3:",), ("gs:",), ("ftp:",), ("hf:",))


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins so may be safetensors: the length of a header, then JSON."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> dtype, shape and place of each tensor, and ``__metadata__``.

    Raises:
        InputError: it is damaged, or larger than `LARGEST_HEADER`.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise InputError(f"{path}: not safetensors, or its header is larger than {LARGEST_HEADER} bytes")
        text = file.read(length)
    if len(text) < length:
        raise InputError(f"{path}: not a readable safetensors file (its header is cut short)")
    try:
        tree = strict_json(text)
    except InputError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a readable safetensors file (its header is {cut(type(tree).__name__)})")
    return tree


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file before its tensors are made.

    That the places fit the shapes, neither overlap nor leave gaps, and end with the file is checked by safetensors.

    Raises:
        InputError: no such file, no header, or more tensors than any network here.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    count = len(header(path))
    if count > MOST_TENSORS:
        raise InputError(f"{path}: {count} tensors, more than the {MOST_TENSORS} that a network here may have")
