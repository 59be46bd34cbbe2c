"""Describe files that were given as weights, and check headers of safetensors. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.file_kinds import HDF5_MAGIC, is_safetensors
from refdet.files.short_text import shorten
from refdet.files.strict_json import strict_json
from refdet.files.weight_programs import REFDET, TRAINING_STATE, describe_checkpoint, has_all

MAX_HEADER_BYTES = 2**24  # limit of the header of a safetensors file
MAX_TENSORS = 20_000  # limit of the tensors of a file; a ResNet-152 with its momentum has 1,400
_METADATA = "__metadata__"  # the only key of a header that is not a tensor
_START_BYTES = 2**20  # enough to find "images" or "annotations" in a COCO file


def describe_file(path: Path) -> str | None:
    """Describe a file by its first bytes, and say how to use it; None if it is not a file, or of an unknown kind."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start.startswith(HDF5_MAGIC):
        return "an HDF5 file, such as a feature store"
    if is_safetensors(start):
        return _describe_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        # torch.save writes a zip file that contains data.pkl or, in older versions, a pickle
        is_other_zip = start.startswith(b"PK") and b"data.pkl" not in start
        kind = "a zip file" if is_other_zip else "a PyTorch checkpoint"
        return f"{kind} (convert it with refdet import-weights)"
    if start.lstrip()[:1] in (b"{", b"["):
        if b'"images"' in start or b'"annotations"' in start:
            return "a COCO instances file (pass it to `instances`)"
        return "a JSON file"
    return None


def _describe_safetensors(path: Path) -> str:
    """Describe a safetensors file by the names of its tensors, and say how to use it."""
    try:
        names = _tensor_names(path)
    except InputError:
        return "a damaged safetensors file"
    if has_all(names, TRAINING_STATE):
        return "a training state (its run directory is the folder above state/)"
    if has_all(names, REFDET):
        return "the weights of a run directory (give the folder with them and model.json)"
    description = describe_checkpoint(names) or "weights of another program"
    return f"{description} (convert it with refdet import-weights)"


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        Name -> dtype, shape and offsets of each tensor, and ``__metadata__``.

    Raises:
        InputError: the header is damaged or larger than `MAX_HEADER_BYTES`.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise InputError(f"{path}: not safetensors, or its header is larger than {MAX_HEADER_BYTES} bytes")
        text = file.read(length)
    if len(text) < length:
        raise InputError(f"{path}: not a readable safetensors file (its header is truncated)")
    try:
        tree = strict_json(text)
    except InputError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a readable safetensors file (its header is {shorten(type(tree).__name__)})")
    return tree


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file before its tensors are allocated.

    safetensors itself checks that the offsets match the shapes, do not overlap or leave gaps, and end with the file.

    Args:
        path: the file.

    Raises:
        InputError: the file does not exist, has no valid header, or has more than `MAX_TENSORS` tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    count = len(_tensor_names(path))
    if count > MAX_TENSORS:
        raise InputError(f"{path}: {count} tensors, more than the limit of {MAX_TENSORS}")


def _tensor_names(path: Path) -> list[str]:
    return [name for name in read_header(path) if name != _METADATA]
