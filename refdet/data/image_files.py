"""List and read image files in a folder or in a zip such as COCO's."""

from __future__ import annotations

import bz2
import copy
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from refdet.data.fetch.hints import how_to_fetch
from refdet.errors import InputError, RuntimeFailure, is_system_error
from refer.image_folder import Listing, list_folder, same_file
from refer.plain_files import check_file_size, read_file

_UTF8_FLAG = 0x800
_ENCRYPTED = 0x1
_COMPRESSION_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)


class ImageFiles(Protocol):
    """Files of a folder or zip of images. Safe to pass to worker processes and threads."""

    path: Path
    listing: Listing

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read a listed file of at most ``max_bytes`` bytes; may raise any exception."""

    def size(self, name: str) -> int:
        """Size of a listed file in bytes, without reading it."""

    def state(self, name: str) -> tuple[int, ...]:
        """Nonnegative integers of which one changes if a listed file is replaced, without reading it."""

    def are_same_file(self, names: Sequence[str]) -> bool:
        """Whether all the listed files are one file on disk, through links."""

    def is_gone(self, name: str) -> bool:
        """After an error from reading a listed file: whether its whole folder or the zip is gone, such as unmounted."""


def open_files(path: Path, argument: str = "images") -> ImageFiles:
    """List a folder, recursively, or a zip.

    Args:
        path: the folder or zip.
        argument: name of the argument that gave the path, for messages.

    Returns:
        Its files.

    Raises:
        InputError: the path does not exist or cannot be listed.
        RuntimeFailure: a disk or network error.
    """
    try:
        if path.is_dir():
            return _Folder(path)
        if not path.is_file():
            raise InputError(
                f"`{argument}` {path}: no such file or folder; give a folder or zip of images{how_to_fetch(path)}"
            )
        return _Zip(path)
    except InputError:
        raise
    except Exception as error:  # zipfile can raise anything on a damaged zip
        if is_system_error(error):
            raise RuntimeFailure(f"`{argument}` {path}: cannot be listed now ({error}); try again") from error
        why = str(error) or type(error).__name__
        problem = "cannot be listed" if path.is_dir() else "not a readable zip"
        raise InputError(f"`{argument}` {path}: {problem} ({why}); give a folder or zip of images") from error


class _Folder:
    """The files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listing = list_folder(path)
        # A subfolder that cannot be listed is skipped with a note, unless the disk or network failed.
        for _, error in self.listing.unlisted:
            if is_system_error(error):
                raise error

    def read(self, name: str, max_bytes: int) -> bytes:
        return read_file(self.path / name, max_bytes, "an image")

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def state(self, name: str) -> tuple[int, ...]:
        found = (self.path / name).stat()
        # the time of modification can be set to any value, that of the change of the inode cannot
        return found.st_size, max(found.st_mtime_ns, 0), max(found.st_ctime_ns, 0)

    def are_same_file(self, names: Sequence[str]) -> bool:
        return same_file([self.path / name for name in names])

    def is_gone(self, name: str) -> bool:
        try:
            with os.scandir((self.path / name).parent) as entries:
                return next(entries, None) is None  # an unmounted disk leaves its mount point, an empty folder
        except OSError:
            return True


class _Zip:
    """The files of a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None  # id of the process that opened it, and the zip
        self._zipfile_names: dict[str, str] = {}  # name in the listing -> name in zipfile, where they differ
        files, unusable = [], {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                name = _decode_name(info)
                if name != info.filename:
                    self._zipfile_names[name] = info.filename
                if why := _why_unusable(info):
                    unusable[name] = why
                else:
                    files.append(name)
        self.listing = Listing(files, unusable, link_targets={}, unlisted=[], parent_links=[])

    def read(self, name: str, max_bytes: int) -> bytes:
        archive = self._open_archive()
        info = archive.getinfo(self._zipfile_names.get(name, name))
        check_file_size(info.file_size, max_bytes, "an image")
        if info.compress_type == zipfile.ZIP_BZIP2:
            return _read_bzip2(archive, info, max_bytes)
        # not ZipFile.read, which decompresses everything before truncating it to the declared size
        with archive.open(info) as member:
            return member.read(info.file_size)

    def size(self, name: str) -> int:
        return self._open_archive().getinfo(self._zipfile_names.get(name, name)).file_size

    def state(self, name: str) -> tuple[int, ...]:
        info = self._open_archive().getinfo(self._zipfile_names.get(name, name))
        return info.file_size, info.CRC

    def are_same_file(self, names: Sequence[str]) -> bool:
        return False  # a zip has no links that are read

    def is_gone(self, name: str) -> bool:
        return not self.path.is_file()

    def _open_archive(self) -> zipfile.ZipFile:
        """The zip, opened by this process."""
        # reopened in each forked worker, as processes would otherwise share the file position
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = (os.getpid(), zipfile.ZipFile(self.path))
            except Exception as error:
                raise RuntimeFailure(f"{self.path}: can no longer be read ({error}); check that it exists") from error
        return self._open[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None}


def _decode_name(info: zipfile.ZipInfo) -> str:
    """Name of a member. macOS and others write UTF-8 without setting its flag; zipfile decodes that as cp437."""
    if info.flag_bits & _UTF8_FLAG or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except ValueError:
        return info.filename


def _why_unusable(info: zipfile.ZipInfo) -> str:
    """Why a member cannot be read, "" if it can."""
    if info.flag_bits & _ENCRYPTED:
        return "encrypted; unpack the zip and give the folder"
    if info.compress_type not in _COMPRESSION_METHODS:
        return f"compressed by unsupported method {info.compress_type}; unpack the zip and give the folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link; unpack the zip and give the folder"
    return ""


def _read_bzip2(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
    """Read a bzip2 member, but no more than its declared size, whereas zipfile would decompress all of it."""
    check_file_size(info.compress_size, max_bytes, "an image")
    # the same member as if it were stored uncompressed, to get its compressed bytes
    packed = copy.copy(info)
    packed.compress_type, packed.file_size = zipfile.ZIP_STORED, info.compress_size
    del packed.CRC  # that of the decompressed data, which zipfile would compare with the compressed bytes
    with archive.open(packed) as member:
        # one byte more than declared, to detect a member that is longer
        data = bz2.BZ2Decompressor().decompress(member.read(info.compress_size), info.file_size + 1)
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {info.filename!r}")
    return data
