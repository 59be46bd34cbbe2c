"""Find the file of an image's ``file_name`` in a folder or zip.

The rules, for everything that opens images:

1. the file with exactly that path;
2. else the file with the longest common path suffix, by component ("a/b/x.png" matches "b/x.png" rather than
   "c/x.png"); several equally good matches are an error that names two;
3. else, for a COCO file name, the file of the same COCO number under COCO's other names, since REFER has the file names
   of 2014 but many keep the files of 2017;
4. without a file name, the file of the image's id under COCO's names.

Backslashes are treated as slashes and names are compared in Unicode NFC. "..", drives and leading slashes are only
compared, and only listed files are opened. Images with different names never share a file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

# COCO_train2014_000000000009.jpg, 000000000009.jpg, and REFER's own COCO_train2014_000000000009_4.jpg. Twelve digits
# with other words are a crop, mask or depth map of that image.
_COCO = re.compile(r"(?:COCO_[A-Za-z]+[0-9]{4}_0{6}([0-9]{6})(?:_[0-9]{1,4})?|0{6}([0-9]{6}))(?:\.[A-Za-z]+)?")
_COCO_NAMES = ("{:012d}.jpg", "COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg")
_FEW = 8  # candidates to compare individually

Key = str | int
"""File name of an image, or its id if it has none."""


class Match(NamedTuple):
    """The file of an image.

    Attributes:
        path: its listed path, None if there is no file.
        reason: why there is no file, "" if there is one.
        shared: number of trailing components that name and path have in common.
        others: number of remaining components of the name.
        elsewhere: whether the file is in another folder than the name says.
        unclear: whether there is no file because of several equally good matches.
    """

    path: str | None
    reason: str = ""
    shared: int = 0
    others: int = 0
    elsewhere: bool = False
    unclear: bool = False


def parts_of(name: str) -> tuple[str, ...]:
    """Split a path into components in NFC, resolving "." and ".."."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    parts: list[str] = []
    for part in name.replace("\\", "/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return tuple(parts)


def coco_number(name: str) -> int | None:
    """COCO number of a file name in COCO's or REFER's format, None for other names."""
    match = _COCO.fullmatch((parts_of(name.partition("?")[0]) or ("",))[-1])
    return int(match[1] or match[2]) if match else None


def is_hidden(part: str) -> bool:
    """Whether a file or folder name is hidden or reserved by an operating system."""
    return part.startswith(".") or part in ("__MACOSX", "@eaDir")


class FileNames:
    """Files of a folder or zip, indexed by their path suffixes.

    Hidden files and files in hidden folders (``__MACOSX/._x.jpg``, ``.thumbnails/x.jpg``) are found only by a name that
    includes the hidden components.

    Args:
        paths: paths relative to the folder, with forward slashes; a duplicate path counts twice.
        root: components of the folder's own path, with which a ``file_name`` may start.
        linked: path of a link to a folder -> path under which the folder's files are listed, "" for the root.
        same_file: returns whether several paths are the same file on disk.
    """

    def __init__(
        self,
        paths: Iterable[str],
        root: Sequence[str] = (),
        linked: Mapping[str, str] | None = None,
        same_file: Callable[[Sequence[str]], bool] = lambda paths: False,
    ) -> None:
        self._root, self._linked, self._same_file = tuple(root), dict(linked or {}), same_file
        self._visible: dict[str, list[str]] = {}
        self._hidden: dict[str, list[str]] = {}
        self._grouped: dict[tuple[bool, str], dict[str, list[str]]] = {}
        self._unhidden: dict[str, list[str]] = {}
        for path in sorted(paths):
            parts = parts_of(path)
            if parts:
                table = self._hidden if any(map(is_hidden, parts)) else self._visible
                table.setdefault(parts[-1], []).append(path)

    def __len__(self) -> int:
        return sum(len(paths) for table in (self._visible, self._hidden) for paths in table.values())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_grouped": {}, "_unhidden": {}}

    def locate(self, images: Iterable[tuple[int, str]]) -> dict[Key, Match]:
        """Find the files of all images of a list.

        The list must be complete: if two names match the same file, the worse match has no file.

        Args:
            images: ids and file names ("" for none).

        Returns:
            File name or id -> match.
        """
        found: dict[Key, Match] = {}
        for image_id, name in images:
            key: Key = name or image_id
            if key not in found:
                found[key] = self._named(name) if name else self._numbered(image_id)
        owners: dict[str, list[Key]] = {}
        for key, match in found.items():
            if match.path is not None:
                owners.setdefault(match.path, []).append(key)
        for path, keys in owners.items():
            if len(keys) > 1:
                _settle(path, keys, found)
        return found

    def _named(self, name: str) -> Match:
        parts = parts_of(name)
        if not parts:
            return Match(None, "not a file name")
        match = self._exact(name, parts)
        if match is None and (inside := self._inside_root(parts)):
            match = self._exact(name, inside)
        match = match or self._longest(parts)
        if match is None and (number := coco_number(name)) is not None:
            match = self._numbered(number)
        return match or Match(None, "no file of that name")

    def _inside_root(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Remove the end of the folder's own path from the start of a name ("images/x.png" in .../images)."""
        for count in range(min(len(parts) - 1, len(self._root)), 0, -1):
            if parts[:count] == self._root[len(self._root) - count :]:
                return parts[count:]
        return ()

    def _numbered(self, number: int) -> Match:
        names = [form.format(number) for form in _COCO_NAMES]
        for name in names:
            if match := self._longest((name,)):
                return match
        return Match(None, f"no file {', '.join(names[:-1])} or {names[-1]}")

    def _exact(self, name: str, parts: tuple[str, ...]) -> Match | None:
        """File with this path, also through a link to a folder that is listed elsewhere."""
        path: list[str] = []
        for part in parts:
            path.append(part)
            target = self._linked.get("/".join(path))
            if target is not None:
                path = list(parts_of(target))
        for wanted in dict.fromkeys((parts, tuple(path))):
            hidden = any(map(is_hidden, wanted))
            same_name = (self._hidden if hidden else self._visible).get(wanted[-1], []) if wanted else []
            found, shared = self._narrowed(hidden, wanted, same_name)
            if found and shared == len(wanted):
                if len(found) > 1:
                    found = self._groups(hidden, wanted[-shared:], found).get("", [])
                elif len(parts_of(found[0])) > shared:
                    found = []
                if 1 < len(found) <= _FEW and found.count(name) == 1:  # others differ only in Unicode normalization
                    found = [name]
                if found:
                    return self._one_of(found, parts, len(parts))
        return None

    def _longest(self, parts: tuple[str, ...]) -> Match | None:
        """File with the longest common suffix."""
        for hidden in (True, False):
            table = self._hidden if hidden else self._visible
            if parts[-1] not in table or (hidden and not any(map(is_hidden, parts))):
                continue
            found, shared = self._narrowed(hidden, parts, table[parts[-1]])
            if hidden:
                found = self._spelt(parts[-shared:], found)
            if found:
                return self._one_of(found, parts, shared)
        return None

    def _narrowed(self, hidden: bool, parts: tuple[str, ...], found: list[str]) -> tuple[list[str], int]:
        """Files of one name with the longest common suffix, and its number of components."""
        shared = 1
        while len(found) > 1 and shared < len(parts):
            deeper = self._groups(hidden, parts[-shared:], found).get(parts[-shared - 1])
            if not deeper:
                break
            found, shared = deeper, shared + 1
        if len(found) == 1:
            shared = _shared(parts, parts_of(found[0]))
        return found, shared

    def _groups(self, hidden: bool, suffix: tuple[str, ...], found: list[str]) -> dict[str, list[str]]:
        """Group files with a common suffix by the component before it, "" if there is none.

        Cached, so that a hundred thousand files of the same name are not slower than others.
        """
        key = (hidden, "/".join(suffix))
        if key not in self._grouped:
            groups: dict[str, list[str]] = {}
            for path in found:
                before = parts_of(path)[: -len(suffix)]
                groups.setdefault(before[-1] if before else "", []).append(path)
            self._grouped[key] = groups
        return self._grouped[key]

    def _spelt(self, suffix: tuple[str, ...], found: list[str]) -> list[str]:
        """Files with a common suffix that have no hidden component before it."""
        key = "/".join(suffix)
        if len(found) == 1 or key not in self._unhidden:
            kept = [path for path in found if not any(map(is_hidden, parts_of(path)[: -len(suffix)]))]
            if len(found) == 1:
                return kept
            self._unhidden[key] = kept
        return self._unhidden[key]

    def _one_of(self, found: list[str], parts: tuple[str, ...], shared: int) -> Match:
        if len(found) > 1 and not (len(found) <= _FEW and self._same_file(found)):
            more = f" and {len(found) - 2} more" if len(found) > 2 else ""
            which = f"duplicate {found[0]}" if found[0] == found[1] else f"{found[0]}, {found[1]}{more}"
            return Match(None, f"ambiguous file name: {which}", unclear=True)
        whole = (*self._root, *parts_of(found[0]))
        before = whole[len(whole) - shared - 1] if len(whole) > shared else None
        others = len(parts) - shared
        elsewhere = others > 0 and before is not None and parts[others - 1] != before
        return Match(found[0], "", shared, others, elsewhere)


def _settle(path: str, keys: list[Key], found: dict[Key, Match]) -> None:
    """Assign a file to the best match of several images."""
    number = coco_number(path)
    numbers = {key if isinstance(key, int) else coco_number(key) for key in keys}
    if number is not None and numbers == {number}:
        return  # the same COCO image
    names = {key: parts_of(key) if isinstance(key, str) else (str(key),) for key in keys}
    best = max((found[key].shared, -found[key].others) for key in keys)
    owners = [key for key in keys if (found[key].shared, -found[key].others) == best]
    rivals = list({names[key]: key for key in owners}.values())
    owning = set(owners)
    for key in keys:
        if key not in owning:
            named = "" if owners[0] == path else f", {owners[0]}"
            found[key] = Match(None, f"the best match, {path}, is the file of another image in the list{named}")
        elif len(rivals) > 1:
            why = f"ambiguous match: {rivals[0]} and {rivals[1]} match {path} equally well"
            found[key] = Match(None, why, unclear=True)


def _shared(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count
