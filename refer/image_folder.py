"""List a folder of images, visiting each folder once."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Listing(NamedTuple):
    """Contents of a folder or zip, with relative paths and forward slashes.

    Attributes:
        files: paths of files.
        unusable: path -> why it cannot be read as a file, such as a broken link.
        link_targets: path of a link to a folder -> path under which the folder's files are listed.
        unlisted: folders that could not be listed, with the error.
        parent_links: links to a parent of the root, which are not followed.
    """

    files: list[str]
    unusable: dict[str, str]
    link_targets: dict[str, str]
    unlisted: list[tuple[str, OSError]]
    parent_links: list[str]


def list_folder(root: str | Path) -> Listing:
    """List a folder recursively, following links.

    A folder with several paths is listed once, under its real path if that is below the root. Links to parents of the
    root are not followed. A link to a file is a file; pipes, devices and broken links are ``unusable``.

    Args:
        root: the folder.

    Returns:
        Its contents.

    Raises:
        OSError: the root cannot be listed.
    """
    listing = Listing([], {}, {}, [], [])
    root_status = os.stat(root)
    visited = {(root_status.st_dev, root_status.st_ino): ""}
    parents = {(status.st_dev, status.st_ino) for status in map(os.stat, Path(root).resolve().parents)}
    folders, links = deque([""]), deque[str]()  # real folders are visited before links
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        try:
            if folder:
                status = os.stat(os.path.join(root, folder))
                identity = (status.st_dev, status.st_ino)
                if identity in visited:
                    listing.link_targets[folder] = visited[identity]
                    continue
                if identity in parents:
                    listing.parent_links.append(folder)
                    continue
                visited[identity] = folder
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif entry.is_file(follow_symlinks=False):
                        listing.files.append(path)
                    elif _links_to_folder(entry, path, listing):
                        links.append(path)
        except OSError as error:
            if not folder:
                raise
            listing.unlisted.append((folder, error))
    return listing


def _links_to_folder(entry: os.DirEntry, path: str, listing: Listing) -> bool:
    """Whether an entry is a link to a folder; if it is another link or a special file, it is added to the listing.

    Args:
        entry: an entry of a folder that is neither a folder nor a regular file itself.
        path: its path, under which it is listed.
        listing: the listing.
    """
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError:
        listing.unusable[path] = "a broken link"
        return False
    except OSError as error:
        listing.unusable[path] = f"a link that cannot be followed ({error.strerror})"
        return False
    if stat.S_ISREG(mode):
        listing.files.append(path)
    elif not stat.S_ISDIR(mode):
        listing.unusable[path] = f"{_SPECIAL_FILES.get(stat.S_IFMT(mode), 'something else')}, not a file"
    return stat.S_ISDIR(mode)


def same_file(paths: Sequence[str | Path]) -> bool:
    """Whether all paths are the same file on disk."""
    try:
        return len({(status.st_dev, status.st_ino) for status in map(os.stat, paths)}) == 1
    except OSError:
        return False
