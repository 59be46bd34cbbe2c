"""Detect what a path is from its first bytes, so that errors can say what was given.

Needs neither torch, h5py nor numpy, so that commands can check paths before importing them.
"""

from __future__ import annotations

import re
import stat
from enum import Enum
from pathlib import Path

_START_BYTES = 4096
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Path turns the double slash into a single one


class FileKind(Enum):
    """Kind of file or folder; the value is its description in messages."""

    MISSING = "no such file or folder"
    URL = "a URL; download it and give the file's path"
    FORBIDDEN = "cannot be read (permission denied)"
    SPECIAL = "a pipe or a device, not a regular file"
    EMPTY = "an empty file"
    RUN = "a run directory"
    RUN_FILE = "a file of a run directory"
    STATES = "the folder of a run's training states"
    STATE = "a training state for refdet train --resume"
    RUNS = "a folder of run directories"
    UNFINISHED = "the folder of an unfinished extraction"
    REFER = "a folder of REFER data"
    DATASET = "one dataset's folder of REFER data"
    FOLDER = "a folder"
    STORE = "an HDF5 file, such as a feature store"
    SAFETENSORS = "a safetensors file"
    TORCH = "a PyTorch checkpoint"
    PICKLE = "a pickle file"
    ZIP = "a zip file"
    JSON = "a JSON file"
    IMAGE = "an image"
    TEXT = "a text file"
    BINARY = "a file of an unknown kind"

    @property
    def is_folder(self) -> bool:
        """Whether this is a kind of folder."""
        return self in _FOLDERS


_FOLDERS = {
    FileKind.RUN,
    FileKind.STATES,
    FileKind.RUNS,
    FileKind.UNFINISHED,
    FileKind.REFER,
    FileKind.DATASET,
    FileKind.FOLDER,
}
_MAGIC = (  # first bytes of a file and its kind; a pickle starts with its protocol, 2 to 5
    (HDF5_MAGIC, FileKind.STORE),
    (b"\x89PNG", FileKind.IMAGE),
    (b"\xff\xd8\xff", FileKind.IMAGE),
    (b"GIF8", FileKind.IMAGE),
    (b"\x80\x02", FileKind.PICKLE),
    (b"\x80\x03", FileKind.PICKLE),
    (b"\x80\x04", FileKind.PICKLE),
    (b"\x80\x05", FileKind.PICKLE),
)


def is_url(path: Path) -> bool:
    """Whether a path is a URL, of any scheme."""
    return _URL.match(str(path)) is not None


def kind_of(path: Path) -> FileKind:
    """Detect what a path is. Only regular files are opened, as opening a pipe would block."""
    if is_url(path):
        return FileKind.URL
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _kind_of_folder(path)
        if not stat.S_ISREG(mode):
            return FileKind.SPECIAL
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except PermissionError:
        return FileKind.FORBIDDEN
    except (OSError, ValueError):  # including names that are too long or contain NUL
        return FileKind.MISSING
    return _kind_of_file(path, start)


def is_safetensors(start: bytes) -> bool:
    """Whether the first bytes of a file may be safetensors: the length of a header (u64, below 4 GiB), then JSON."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def run_directory_near(path: Path) -> Path | None:
    """The run directory that was probably meant by a path, or None.

    It is the parent or grandparent of the path or, if the path is a folder with a single run directory, that one.
    """
    for folder in (path.parent, path.parent.parent):
        if _is_run(folder):
            return folder
    inside = runs_in(path)
    return inside[0] if len(inside) == 1 else None


def runs_in(folder: Path, max_entries: int = 1000) -> list[Path]:
    """Sorted run directories among the first ``max_entries`` entries of a folder."""
    try:
        runs = [entry for entry, _ in zip(folder.iterdir(), range(max_entries), strict=False) if _is_run(entry)]
    except OSError:
        return []
    return sorted(runs)


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "model.json").is_file() or (folder / "model.safetensors").is_file()
    except OSError:
        return False


def _kind_of_folder(path: Path) -> FileKind:
    if _is_run(path):
        return FileKind.RUN
    if (path / "plan.json").is_file():
        return FileKind.UNFINISHED
    if any(path.glob("step-*.safetensors")):
        return FileKind.STATES
    if any(path.glob("*refs(*).*")):
        return FileKind.DATASET
    if any(path.glob("*/*refs(*).*")):
        return FileKind.REFER
    return FileKind.RUNS if runs_in(path) else FileKind.FOLDER


def _kind_of_file(path: Path, start: bytes) -> FileKind:
    if not start:
        return FileKind.EMPTY
    if re.fullmatch(r"step-\d+\.(safetensors|json)", path.name) and path.parent.name == "state":
        return FileKind.STATE
    if path.name in ("model.json", "model.safetensors") and _is_run(path.parent):
        return FileKind.RUN_FILE
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start.startswith(b"PK"):
        # torch.save writes a zip file with these members, TorchScript included
        return FileKind.TORCH if b"data.pkl" in start or b"/version" in start else FileKind.ZIP
    if is_safetensors(start):
        return FileKind.SAFETENSORS
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"{", b"["):
        return FileKind.JSON
    return FileKind.BINARY if b"\0" in start else FileKind.TEXT
