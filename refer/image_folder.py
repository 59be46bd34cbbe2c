"""The files in a folder of images, each real folder visited once, and a guarded way to read one."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class Listing(NamedTuple):
    """What is in a folder or zip; paths are relative to it, with slashes.

    Attributes:
        files: paths of files.
        unusable: path -> why what is there cannot be read as a file, such as a link to nothing.
        linked: path of a link to a folder -> path under which that folder's files are listed.
        unread: folders that could not be listed, with the error.
        above: links to a folder that holds this one; they are not followed.
    """

    files: list[str]
    unusable: dict[str, str]
    linked: dict[str, str]
    unread: list[tuple[str, OSError]]
    above: list[str]


def list_folder(root: str | Path) -> Listing:
    """List a folder with all below it, through links.

    A folder that can be reached in several ways is listed once, under its own path if that lies below the root. So
    links to a folder itself cost nothing, and links that lead above the root are not followed. A link to a file is a
    file; pipes, devices and links to nothing are ``unusable``.

    Raises:
        OSError: the root itself cannot be listed.
    """
    found = Listing([], {}, {}, [], [])
    own = os.stat(root)
    visited = {(own.st_dev, own.st_ino): ""}
    above = {(status.st_dev, status.st_ino) for status in map(os.stat, Path(root).resolve().parents)}
    folders, links = deque([""]), deque[str]()  # folders below the root come before any link to them
    while folders or links:
        linked = not folders
        folder = links.popleft() if linked else folders.popleft()
        try:
            if folder:
                status = os.stat(os.path.join(root, folder))
                identity = (status.st_dev, status.st_ino)
                if identity in visited:
                    found.linked[folder] = visited[identity]
                    continue
                if identity in above:
                    found.above.append(folder)
                    continue
                visited[identity] = folder
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif entry.is_file(follow_symlinks=False):
                        found.files.append(path)
                    elif _what(entry, path, found) == "folder":
                        links.append(path)
        except OSError as error:
            if not folder:
                raise
            found.unread.append((folder, error))
    return found


def _what(entry: os.DirEntry, path: str, found: Listing) -> str:
    """Note a link or a special file in the listing; "folder" for a link to one."""
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError:
        found.unusable[path] = "a link to nothing"
    except OSError as error:
        found.unusable[path] = f"a link that cannot be followed ({error.strerror})"
    else:
        if stat.S_ISDIR(mode):
            return "folder"
        if stat.S_ISREG(mode):
            found.files.append(path)
        else:
            found.unusable[path] = f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"
    return ""


def same_file(paths: Sequence[str | Path]) -> bool:
    """Whether all of these are one file on the disk."""
    try:
        return len({(status.st_dev, status.st_ino) for status in map(os.stat, paths)}) == 1
    except OSError:
        return False


def read_file(path: str | Path, most: int, of: str = "an image") -> bytes:
    """The bytes of a regular file.

    Args:
        most: bytes; a larger file is refused.
        of: what it should be, for the message.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # or a pipe would keep us waiting
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a file")
        refuse_huge(status.st_size, most, of)
        return file.read(status.st_size)


def refuse_huge(size: int, most: int, of: str = "an image") -> None:
    """OSError where a file of this size in bytes is too large."""
    if size > most:
        shown = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
        raise OSError(f"of {shown}, too large for {of}")
