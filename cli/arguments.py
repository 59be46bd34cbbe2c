"""Checks of a command's arguments that take no time, done before what is slow to import. Each names its option."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from refdet.errors import InputError
from refdet.files.file_kinds import FileKind, kind_of, run_directory_near, runs_in

_LONGEST_NAME = 255 - 32  # bytes; temporary files beside it have longer names
_WEIGHTS = (FileKind.TORCH, FileKind.PICKLE, FileKind.SAFETENSORS)


def check_run_directory(option: str, path: Path) -> None:
    """InputError unless a path leads to a run directory (or its model file); it says what is there and what to give."""
    kind = kind_of(path)
    if kind in (FileKind.RUN, FileKind.RUN_FILE):
        return
    near = run_directory_near(path)
    if kind is FileKind.RUNS:
        names = ", ".join(map(str, runs_in(path)[:3]))
        raise InputError(f"{option} {path}: {kind.value}, not a run directory; give one of them: {names}")
    if near is not None and kind is not FileKind.ADDRESS:
        raise InputError(f"{option} {path}: {kind.value}; give the run directory {near}")
    if kind in _WEIGHTS:
        raise InputError(f"{option} {path}: {kind.value}, not a run directory; refdet import-weights makes one of "
                         "other programs' weights")  # fmt: skip
    _refuse(option, path, kind, "a run directory", "the folder that refdet train or refdet import-weights wrote")


def check_store(option: str, path: Path) -> None:
    """InputError unless a path leads to an HDF5 file."""
    kind = kind_of(path)
    if kind is FileKind.STORE:
        return
    unfinished = path if kind is FileKind.UNFINISHED else path.with_name(path.name + ".parts") if path.name else path
    if kind in (FileKind.UNFINISHED, FileKind.MISSING) and (unfinished / "plan.json").is_file():
        raise InputError(f"{option} {path}: not finished yet, {unfinished} holds its parts; the same refdet "
                         "extract-features with --resume does the rest")  # fmt: skip
    _refuse(option, path, kind, "a store of features", "the HDF5 file that refdet extract-features writes")


def check_json(option: str, path: Path, what: str = "a JSON file") -> None:
    """InputError unless a path leads to text, which the command will read and check."""
    kind = kind_of(path)
    # What is malformed is named by its line later; JSON in UTF-16 looks like anything.
    if kind not in (FileKind.JSON, FileKind.TEXT, FileKind.EMPTY, FileKind.BINARY):
        _refuse(option, path, kind, what)


def check_weights(option: str, path: Path) -> None:
    """InputError unless a path leads to what may be another program's weights."""
    kind = kind_of(path)
    if kind in (FileKind.RUN, FileKind.RUN_FILE, FileKind.STATE):
        raise InputError(f"{option} {path}: {kind.value} of refdet's own; give the run directory itself to "
                         "--checkpoint or --weights")  # fmt: skip
    if kind.is_folder:
        raise InputError(f"{option} {path}: a folder; give the file in it")
    if kind in (FileKind.MISSING, FileKind.ADDRESS, FileKind.FORBIDDEN, FileKind.SPECIAL):
        _refuse(option, path, kind, "a file of weights")
    if kind not in (*_WEIGHTS, FileKind.ZIP, FileKind.BINARY):
        raise InputError(f"{option} {path}: {kind.value}: damaged, or not a file of torch.save or safetensors")


def check_images(option: str, path: Path) -> None:
    """InputError unless a path leads to a folder or a zip."""
    kind = kind_of(path)
    if kind is FileKind.MISSING:
        raise InputError(f"{option} {path}: no such folder or zip of images")
    if kind in (FileKind.RUN, FileKind.STATES, FileKind.UNFINISHED):
        raise InputError(f"{option} {path}: {kind.value}, not a folder or zip of images")
    if not kind.is_folder and kind is not FileKind.ZIP:
        raise InputError(f"{option} {path}: neither a folder nor a readable zip of images: {kind.value}")


def check_refer_root(path: Path, dataset: str) -> None:
    """InputError unless a path leads to the folder above that of a dataset."""
    kind = kind_of(path)
    if kind is FileKind.DATASET and not (dataset and (path / dataset).is_dir()):
        raise InputError(f"--refer-root {path}: {kind.value}; give the folder above it: {path.resolve().parent}")
    if kind in (FileKind.ADDRESS, FileKind.SPECIAL, FileKind.FORBIDDEN) or not (
        kind.is_folder or kind is FileKind.MISSING  # of which the reader says where to get it
    ):
        _refuse("--refer-root", path, kind, "the folder of the REFER data")


def check_new_file(option: str, path: Path, may_exist: bool = False) -> None:
    """InputError unless a file can be written at a path, over an older one only where ``may_exist``."""
    _check_name(option, path)
    if not path.name or path.is_dir():
        name = "features.h5" if path.name in ("", "..") else f"{path.name}.h5"
        raise InputError(f"{option} {path}: a folder; give the name of a file, such as {path / name}")
    if os.path.lexists(path):
        kind = kind_of(path)
        if kind is FileKind.SPECIAL:
            raise InputError(f"{option} {path}: {kind.value}; choose another {option}")
        if not may_exist:
            raise InputError(f"{path} exists; choose another {option} or remove it")
        if kind is not FileKind.STORE:
            raise InputError(f"{option} {path}: {kind.value}, not a store to resume; choose another {option}")
    _check_parent(option, path.absolute().parent)


def check_new_folder(option: str, path: Path, empty: bool = True) -> None:
    """InputError unless files can be written into a folder at a path; nothing may be in it where ``empty``."""
    _check_name(option, path)
    is_file = os.path.lexists(path) and not path.is_dir()
    if empty and (is_file or (path.is_dir() and any(path.iterdir()))):
        raise InputError(f"{option} {path}: exists and is not an empty folder; choose another or remove it")
    if is_file:
        raise InputError(f"{option} {path}: is a file where a folder is needed; choose another {option}")
    _check_parent(option, path if path.is_dir() else path.absolute().parent)


def check_device(option: str, name: str | None) -> None:
    """InputError unless a name is that of a device; whether there is one, only torch knows."""
    if name is not None and not re.fullmatch(r"auto|cpu|(cuda|xpu|mps)(:\d+)?", name):
        raise InputError(f"{option} {name}: no name of a device; give cpu, cuda, cuda:1 (the second GPU) or auto")


def check_not_empty(option: str, values: Iterable[str]) -> None:
    """InputError where an option that takes names with commas between has been given none."""
    for text in values:
        if not any(name.strip() for name in text.split(",")):
            raise InputError(f"{option} {text!r}: no name in it; leave {option} out, or name what you want")


def _refuse(option: str, path: Path, kind: FileKind, wanted: str, which: str = "") -> None:
    if kind in (FileKind.MISSING, FileKind.ADDRESS, FileKind.FORBIDDEN, FileKind.SPECIAL):
        also = f"; {wanted} is needed" + f", {which}" * bool(which) if kind is not FileKind.ADDRESS else ""
        raise InputError(f"{option} {path}: {kind.value}{also}")
    raise InputError(f"{option} {path}: {kind.value}, not {wanted}" + f"; give {which}" * bool(which))


def _check_name(option: str, path: Path) -> None:
    if kind_of(path) is FileKind.ADDRESS:
        raise InputError(f"{option} {path}: an address; give a path on this machine")
    try:
        encoded = path.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{option} {path}: its name is not valid UTF-8; choose another {option}") from None
    if "\0" in str(path) or len(encoded) > _LONGEST_NAME:
        raise InputError(f"{option} {str(path)[:60]!r}...: its name is too long or no name; choose another {option}")


def _check_parent(option: str, folder: Path) -> None:
    """See that the folder, or the nearest there is above it, can be written to."""
    there = next((parent for parent in (folder, *folder.parents) if os.path.lexists(parent)), folder)
    if not there.is_dir():
        raise InputError(f"{option}: {there} is a file where a folder is needed; choose another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option}: {there} cannot be written to (permission denied, or it is mounted read-only)")
