"""Fast checks of a command's arguments, done before slow imports. Every error message names the option."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from refdet.data.fetch.hints import how_to_fetch
from refdet.errors import InputError
from refdet.files.file_kinds import FileKind, kind_of, run_directory_near, runs_in

_MAX_NAME_BYTES = 255 - 32  # the usual limit of file systems, less room for the suffixes of temporary files
_WEIGHTS = (FileKind.TORCH, FileKind.PICKLE, FileKind.SAFETENSORS)


def check_run_directory(option: str, path: Path) -> None:
    """Check that a path is a run directory or its model file.

    Args:
        option: the option, for error messages.
        path: the path that was given.

    Raises:
        InputError: the path is neither; the message says what it is and what to give.
    """
    kind = kind_of(path)
    if kind in (FileKind.RUN, FileKind.RUN_FILE):
        return
    nearby_run = run_directory_near(path)
    if kind is FileKind.RUNS:
        names = ", ".join(map(str, runs_in(path)[:3]))
        raise InputError(f"{option} {path}: {kind.value}, not a run directory; give one of them: {names}")
    if nearby_run is not None and kind is not FileKind.URL:
        raise InputError(f"{option} {path}: {kind.value}; give the run directory {nearby_run}")
    if kind in _WEIGHTS:
        raise InputError(f"{option} {path}: {kind.value}, not a run directory; convert it with refdet import-weights")
    _raise_wrong_kind(
        option, path, kind, "a run directory", "a folder written by refdet train or refdet import-weights"
    )


def check_ray(address: str | None, part: str | None = None) -> None:
    """Check the option ``--ray``, the address of a Ray cluster.

    Args:
        address: the value of the option, None if it was not given.
        part: the value of ``--part``, None if it was not given.

    Raises:
        InputError: the address has the wrong form, ``--part`` is given too, or Ray is not installed.
    """
    if address is None:
        return
    from importlib.util import find_spec

    from refdet.extraction.ray_cluster import NOT_INSTALLED, check_address

    check_address(address)
    if part is not None:
        raise InputError(
            f"--part {part}: not together with --ray, which divides the work itself; give only one of them"
        )
    if find_spec("ray") is None:
        raise InputError(NOT_INSTALLED)


def check_store(option: str, path: Path) -> None:
    """Check that a path is an HDF5 file, by its first bytes.

    Args:
        option: the option, for error messages.
        path: the path that was given.

    Raises:
        InputError: the path is not an HDF5 file; the message says what it is and what to give.
    """
    kind = kind_of(path)
    if kind is FileKind.STORE:
        return
    unfinished = path  # the folder of an unfinished extraction: the path itself, or its neighbor
    if kind is not FileKind.UNFINISHED and path.name:
        unfinished = path.with_name(path.name + ".parts")
    if kind in (FileKind.UNFINISHED, FileKind.MISSING) and (unfinished / "plan.json").is_file():
        raise InputError(
            f"{option} {path}: not finished yet (parts in {unfinished}); finish it with the same refdet "
            "extract-features command and --resume"
        )
    _raise_wrong_kind(option, path, kind, "a feature store", "an HDF5 file written by refdet extract-features")


def check_text_file(option: str, path: Path, what: str = "a JSON file") -> None:
    """Check that a path can be a JSON file or other text, without reading all of it.

    Args:
        option: the option, for error messages.
        path: the path that was given.
        what: the kind of file that is needed, with an article.

    Raises:
        InputError: the path is missing, a folder, or a file recognized as another kind, such as a zip.
    """
    kind = kind_of(path)
    # Whatever may be text is accepted, also UTF-16, which looks like binary data: the parser reports malformed lines.
    if kind not in (FileKind.JSON, FileKind.TEXT, FileKind.EMPTY, FileKind.BINARY):
        _raise_wrong_kind(option, path, kind, what)


def check_weights(option: str, path: Path) -> None:
    """Check that a path can be a weights file of another program.

    Args:
        option: the option, for error messages.
        path: the path that was given.

    Raises:
        InputError: the path is missing, a folder, one of refdet's own files or another kind of file.
    """
    kind = kind_of(path)
    if kind in (FileKind.RUN, FileKind.RUN_FILE, FileKind.STATE):
        raise InputError(
            f"{option} {path}: {kind.value} of refdet; pass the run directory itself to --checkpoint or --weights"
        )
    if kind.is_folder:
        raise InputError(f"{option} {path}: a folder; give a file in it")
    if kind in (FileKind.MISSING, FileKind.URL, FileKind.FORBIDDEN, FileKind.SPECIAL):
        _raise_wrong_kind(option, path, kind, "a weights file")
    if kind not in (*_WEIGHTS, FileKind.ZIP, FileKind.BINARY):
        raise InputError(
            f"{option} {path}: {kind.value}, damaged or not weights; give a file of torch.save, a .pkl of detectron2, "
            "or safetensors"
        )


def check_images(option: str, path: Path) -> None:
    """Check that a path is a folder or zip of images.

    Args:
        option: the option, for error messages.
        path: the path that was given.

    Raises:
        InputError: the path is neither.
    """
    kind = kind_of(path)
    if kind is FileKind.MISSING:
        raise InputError(f"{option} {path}: no such file or folder; give a folder or zip of images{how_to_fetch(path)}")
    if kind in (FileKind.RUN, FileKind.STATES, FileKind.UNFINISHED):
        raise InputError(f"{option} {path}: {kind.value}; give a folder or zip of images")
    if not kind.is_folder and kind is not FileKind.ZIP:
        raise InputError(f"{option} {path}: {kind.value}; give a folder or readable zip of images")


def check_refer_root(path: Path, dataset: str = "") -> None:
    """Check that a path is the folder that holds the REFER datasets; a missing folder is reported later.

    Args:
        path: the value of --refer-root.
        dataset: name of the dataset that will be read from the folder, "" if it is not known yet.

    Raises:
        InputError: the path is a file, or the folder of a single dataset.
    """
    kind = kind_of(path)
    if kind is FileKind.DATASET and not (dataset and (path / dataset).is_dir()):
        raise InputError(f"--refer-root {path}: {kind.value}; give the folder above it: {path.resolve().parent}")
    if kind in (FileKind.URL, FileKind.SPECIAL, FileKind.FORBIDDEN) or not (
        kind.is_folder or kind is FileKind.MISSING  # a missing folder is reported later, with the download command
    ):
        _raise_wrong_kind("--refer-root", path, kind, "the REFER data folder")


def check_new_file(option: str, path: Path, example: str, may_exist: bool = False) -> None:
    """Check that a file can be written.

    Args:
        option: the option, for error messages.
        path: the file to write.
        example: a file name of the kind that is written, for error messages.
        may_exist: whether the path may be an existing store, which the command would resume.

    Raises:
        InputError: the path exists (with ``may_exist``: exists, but is not a store), is invalid or cannot be
            written to.
    """
    _check_name(option, path)
    if not path.name or path.is_dir():
        name = example if path.name in ("", "..") else path.name + Path(example).suffix
        raise InputError(f"{option} {path}: a folder; give a file name, such as {path / name}")
    if os.path.lexists(path):
        kind = kind_of(path)
        if kind is FileKind.SPECIAL:
            raise InputError(f"{option} {path}: {kind.value}; choose another {option}")
        if not may_exist:
            raise InputError(f"{path} exists; choose another {option} or remove it")
        if kind is not FileKind.STORE:
            raise InputError(f"{option} {path}: {kind.value}, not a feature store to resume; choose another {option}")
    _check_parent(option, path.absolute().parent)


def check_writable_folder(option: str, path: Path, must_be_empty: bool = True) -> None:
    """Check that a folder can be written to.

    Args:
        option: the option, for error messages.
        path: the folder.
        must_be_empty: whether it must be empty or missing.

    Raises:
        InputError: the path is a file, cannot be written to, or is not empty although ``must_be_empty``.
    """
    _check_name(option, path)
    is_file = os.path.lexists(path) and not path.is_dir()
    if must_be_empty and (is_file or (path.is_dir() and any(path.iterdir()))):
        raise InputError(f"{option} {path}: exists and is not an empty folder; choose another {option} or remove it")
    if is_file:
        raise InputError(f"{option} {path}: a file, not a folder; choose another {option}")
    _check_parent(option, path if path.is_dir() else path.absolute().parent)


def check_device(option: str, name: str | None) -> None:
    """Check the syntax of a device name, but not whether the device exists.

    Args:
        option: the option, for error messages.
        name: the name, None if the option was not given.

    Raises:
        InputError: the name has the wrong form.
    """
    if name is not None and not re.fullmatch(r"auto|cpu|(cuda|xpu|mps)(:\d+)?", name):
        raise InputError(f"{option} {name}: not a device; give cpu, cuda, cuda:1 (the second GPU) or auto")


def check_not_empty(option: str, values: Iterable[str]) -> None:
    """Check that each value of an option that takes comma-separated names has at least one name.

    Args:
        option: the option, for error messages.
        values: the values that were given.

    Raises:
        InputError: a value has no name.
    """
    for text in values:
        if not any(name.strip() for name in text.split(",")):
            raise InputError(f"{option} {text!r}: no names in it; give at least one or omit {option}")


def _raise_wrong_kind(option: str, path: Path, kind: FileKind, expected: str, description: str = "") -> NoReturn:
    """Raise an InputError that says what a path is and what is needed instead.

    Args:
        option: the option.
        path: the path that was given.
        kind: what the path is.
        expected: what is needed, with an article, such as "a run directory".
        description: what produces such a file or folder, "" if that is obvious.
    """
    problem = f"{option} {path}: {kind.value}"
    if kind is FileKind.URL:
        raise InputError(problem)
    if kind in (FileKind.MISSING, FileKind.FORBIDDEN, FileKind.SPECIAL):
        details = f", {description}" if description else ""
        hint = how_to_fetch(path) if kind is FileKind.MISSING else ""
        raise InputError(f"{problem}; {expected} is needed{details}{hint}")
    raise InputError(f"{problem}, not {expected}" + (f"; give {description}" if description else ""))


def _check_name(option: str, path: Path) -> None:
    """Check that a path to write is local and has a name that the file system accepts."""
    if kind_of(path) is FileKind.URL:
        raise InputError(f"{option} {path}: a URL; give a local path")
    try:
        encoded = path.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{option} {path}: name is not valid UTF-8; choose another {option}") from None
    if "\0" in str(path) or len(encoded) > _MAX_NAME_BYTES:
        raise InputError(f"{option} {str(path)[:60]!r}...: name is too long or contains NUL; choose another {option}")


def _check_parent(option: str, folder: Path) -> None:
    """Check that a folder, or the nearest folder above it that exists, can be written to."""
    existing = next((parent for parent in (folder, *folder.parents) if os.path.lexists(parent)), folder)
    if not existing.is_dir():
        raise InputError(f"{option}: {existing} is a file, not a folder; choose another {option}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{option}: {existing} cannot be written to (permission denied or read-only); choose another {option}"
        )
