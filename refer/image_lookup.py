"""Which file an image's ``file_name`` means, among the files of a folder or zip.

The rule, for everything that opens an image:

1. the file at exactly that path;
2. else the one that shares the longest path suffix with it, component by component ("b/x.png" is meant by
   "a/b/x.png" rather than "c/x.png" is); several equally good ones are an error that names two;
3. else, where the name is in COCO's form, the file of the same COCO number under COCO's other names, since REFER
   names the files of 2014 and many keep those of 2017;
4. where there is no file name at all, the file of the image's id under COCO's names.

A backslash counts as a slash, names are compared in Unicode's NFC, and "..", a drive or a leading slash only ever take
part in the comparison: nothing is opened but what was listed. Two images of different names never share a file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

# COCO_train2014_000000000009.jpg, 000000000009.jpg, and REFER's own COCO_train2014_000000000009_4.jpg. Twelve digits
# with other words beside them are somebody's crop, mask or depth map of that image.
_COCO = re.compile(r"(?:COCO_[A-Za-z]+[0-9]{4}_0{6}([0-9]{6})(?:_[0-9]{1,4})?|0{6}([0-9]{6}))(?:\.[A-Za-z]+)?")
_COCO_NAMES = ("{:012d}.jpg", "COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg")
_FEW = 8  # candidates that are looked at one by one

Key = str | int
"""What an image is sought by: its file name, or its id where it has none."""


class Match(NamedTuple):
    """The file of an image.

    Attributes:
        path: as it was listed; None for none.
        reason: why there is none, "" where there is one.
        shared: how many components of the name are those of the path, from the last on.
        others: how many components of the name are left over.
        elsewhere: whether the file lies under another folder than the name gives.
        unclear: whether there is none because several would do.
    """

    path: str | None
    reason: str = ""
    shared: int = 0
    others: int = 0
    elsewhere: bool = False
    unclear: bool = False


def parts_of(name: str) -> tuple[str, ...]:
    """The components of a path in NFC, without ".", ".." and what ".." takes back."""
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
    """The COCO number of a file name in COCO's or REFER's form; None for any other name."""
    match = _COCO.fullmatch((parts_of(name.partition("?")[0]) or ("",))[-1])
    return int(match[1] or match[2]) if match else None


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is what a system or program keeps for itself."""
    return part.startswith(".") or part in ("__MACOSX", "@eaDir")


class FileNames:
    """The files of a folder or zip, by the end of their paths.

    Hidden files and those in hidden folders (``__MACOSX/._x.jpg``, ``.thumbnails/x.jpg``) are found only by a name that
    spells what is hidden about them.

    Args:
        paths: with slashes, relative to the folder; a path that is there twice counts twice.
        root: the components of the folder's own path, which a ``file_name`` may begin with.
        linked: path of a link to a folder -> path of that folder, "" for the root, where its files are listed.
        same_file: tells whether several paths are one file on the disk.
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
        """The files of all images of a list, given as ids and file names ("" for none).

        The list must be whole: of two different names that would mean one file, the one that shares less of its path
        has no file.
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
            return Match(None, "that names no file")
        match = self._exact(name, parts)
        if match is None and (inside := self._inside_root(parts)):
            match = self._exact(name, inside)
        match = match or self._longest(parts)
        if match is None and (number := coco_number(name)) is not None:
            match = self._numbered(number)
        return match or Match(None, "no file of that name")

    def _inside_root(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """The rest of a name that begins with the end of the folder's own path ("images/x.png" in .../images)."""
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
        """The file at this path, also through a link to a folder that is listed elsewhere."""
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
                if 1 < len(found) <= _FEW and found.count(name) == 1:  # another differs in its Unicode form alone
                    found = [name]
                if found:
                    return self._one_of(found, parts, len(parts))
        return None

    def _longest(self, parts: tuple[str, ...]) -> Match | None:
        """The file that shares the longest suffix with the name."""
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
        """Those of the files of one name that share most of a path, and how many components that is."""
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
        """The files that end in a suffix, all of a table, by the component before it; "" where there is none.

        Kept, so that folders with a hundred thousand files of one name cost no more than others.
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
        """Those of the files that end in a suffix that have nothing hidden before it."""
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
            which = f"{found[0]} is there twice" if found[0] == found[1] else f"{found[0]}, {found[1]}{more}"
            return Match(None, f"it is not clear which file that is: {which}", unclear=True)
        whole = (*self._root, *parts_of(found[0]))
        before = whole[len(whole) - shared - 1] if len(whole) > shared else None
        others = len(parts) - shared
        elsewhere = others > 0 and before is not None and parts[others - 1] != before
        return Match(found[0], "", shared, others, elsewhere)


def _settle(path: str, keys: list[Key], found: dict[Key, Match]) -> None:
    """Leave a file to those of several images that name it best."""
    number = coco_number(path)
    numbers = {key if isinstance(key, int) else coco_number(key) for key in keys}
    if number is not None and numbers == {number}:
        return  # the same image of COCO, under whatever folder
    names = {key: parts_of(key) if isinstance(key, str) else (str(key),) for key in keys}
    best = max((found[key].shared, -found[key].others) for key in keys)
    owners = [key for key in keys if (found[key].shared, -found[key].others) == best]
    rivals = list({names[key]: key for key in owners}.values())
    owning = set(owners)
    for key in keys:
        if key not in owning:
            named = "" if owners[0] == path else f", {owners[0]}"
            found[key] = Match(None, f"the nearest, {path}, is the file of another image of the list{named}")
        elif len(rivals) > 1:
            why = f"it is not clear whose file {path} is: {rivals[0]} and {rivals[1]} fit it equally well"
            found[key] = Match(None, why, unclear=True)


def _shared(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count
