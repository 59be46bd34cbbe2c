"""Unpack zip and tar archives from the web: only selected files, and none outside the folder."""

from __future__ import annotations

import filecmp
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from refdet.errors import InputError, RuntimeFailure
from refdet.files.atomic import report_disk_full
from refdet.files.short_text import format_missing_space, short_repr

_RESERVED_BYTES = 2**26  # disk space to leave free
_DRIVE = re.compile(r"[A-Za-z]:")  # of a path on Windows
_ARCHIVE_ERRORS = (  # what zipfile, tarfile and the decompressors raise on damaged or unsupported archives
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    UnicodeError,
    NotImplementedError,
    RuntimeError,
)
_PREFIX = ".unpacking-"  # of the names of temporary folders


@dataclass(frozen=True)
class _Member:
    """A file in an archive.

    Attributes:
        name: its path in the archive.
        size: its size in bytes, unpacked.
        open: opens the file for reading.
    """

    name: str
    size: int
    open: Callable[[], IO[bytes]]


@contextmanager
def unpack_temporarily(
    archive: Path, name: str, target_path: Callable[[str], str | None], parent: Path
) -> Iterator[Path]:
    """Unpack the selected files of an archive into a temporary folder, which is removed at the end.

    Args:
        archive: a zip or tar file.
        name: name of the archive in error messages, such as its URL.
        target_path: maps the path of a file in the archive to its path below the temporary folder, None to skip it.
        parent: the folder to create the temporary folder in.

    Yields:
        The temporary folder.

    Raises:
        InputError: not an archive, damaged, two selected files with the same path, or any file that is outside the
            folder, a link, a device or encrypted.
        RuntimeFailure: not enough disk space.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with report_disk_full(parent, "free some space and run it again"):
            try:
                with _open_archive(archive, name) as members:
                    _extract(members, name, target_path, folder)
            except (*_ARCHIVE_ERRORS, OSError) as error:
                # gzip and bz2 raise an OSError without errno for damaged contents
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise InputError(f"{name}: damaged archive ({short_repr(str(error))}); download it again") from None
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(parent: Path) -> None:
    """Remove the temporary folders of processes that were killed; call only while no other process is unpacking."""
    for folder in parent.glob(f"{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def move_files(folder: Path, out: Path) -> tuple[list[Path], list[Path]]:
    """Move all files of a folder to the same paths in another one, unless a different file already exists there.

    Returns:
        The new paths of the moved files, and the paths of existing files, which were kept as they have other contents.
    """
    moved, kept = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not filecmp.cmp(path, target, shallow=False):
            kept.append(target)
        else:
            os.replace(path, target)
            moved.append(target)
    return moved, kept


def _extract(members: list[_Member], name: str, target_path: Callable[[str], str | None], folder: Path) -> None:
    """Unpack the files that `unpack_temporarily` selects, after checking the disk space."""
    selected: dict[str, _Member] = {}
    for member in members:
        target = target_path(member.name)
        if target is not None and selected.setdefault(target, member) is not member:
            raise InputError(f"{name}: duplicate {target}")
    size = sum(member.size for member in selected.values())
    free = shutil.disk_usage(folder).free
    if free < size + _RESERVED_BYTES:
        raise RuntimeFailure(
            f"{name}: unpacking in {folder.parent} needs {format_missing_space(size + _RESERVED_BYTES, free)}; free "
            "some space and run it again"
        )
    for target, member in selected.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, path.open("xb") as file:
            _copy(source, file, member, name)


def _copy(source: IO[bytes], file: IO[bytes], member: _Member, name: str) -> None:
    """Copy a file out of the archive ``name``, but no more bytes than the archive declares."""
    remaining = member.size
    while chunk := source.read(2**20):
        remaining -= len(chunk)
        if remaining < 0:
            break
        file.write(chunk)
    if remaining != 0:
        raise InputError(f"{name}: {short_repr(member.name)} has another size than the archive says; download it again")


@contextmanager
def _open_archive(archive: Path, name: str) -> Iterator[list[_Member]]:
    """Open a zip or tar file and yield all its files, without folders."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield [_zip_member(file, info, name) for info in file.infolist() if not info.is_dir()]
        return
    try:
        tar = tarfile.open(archive)  # noqa: SIM115  # closed below
    except tarfile.TarError:
        raise InputError(f"{name}: not a zip or tar archive; download it again") from None
    with tar:
        yield [_tar_member(tar, info, name) for info in tar if not info.isdir()]
        while tar.fileobj is not None and tar.fileobj.read(2**20):
            pass  # to the end of the compressed data, where its checksum is compared: tarfile stops earlier


def _zip_member(file: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> _Member:
    _check_inside(info.filename, name)
    if info.flag_bits & 1:  # encryption
        raise InputError(f"{name}: {short_repr(info.filename)} is encrypted")
    unix_mode = info.external_attr >> 16  # 0 from programs that do not store one
    if stat.S_IFMT(unix_mode) not in (0, stat.S_IFREG):
        raise InputError(f"{name}: {short_repr(info.filename)} is a link or device")
    return _Member(info.filename, info.file_size, lambda: file.open(info))


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo, name: str) -> _Member:
    _check_inside(info.name, name)
    if not info.isreg():
        raise InputError(f"{name}: {short_repr(info.name)} is a link or device")

    def open_member() -> Any:
        return tar.extractfile(info)

    return _Member(info.name, info.size, open_member)


def _check_inside(member: str, name: str) -> None:
    """Raise InputError if the path of a file in an archive leads out of the folder that it is unpacked into."""
    path = PurePosixPath(member.replace("\\", "/"))  # backslashes separate folders on Windows
    if path.is_absolute() or ".." in path.parts or _DRIVE.match(member) or "\0" in member:
        raise InputError(f"{name}: {short_repr(member)} would be written outside its folder; do not use this archive")
