"""Find the file of an image's ``file_name`` in a folder or zip.

The rules, for everything that opens images:

1. the file with exactly that path;
2. else the file of the same name that has the most trailing path components in common ("a/b/x.png" matches "b/x.png"
   rather than "c/x.png"); several equally good matches are an error that names two;
3. else, for a COCO file name, the file of the same COCO number under COCO's other names, since REFER has the file names
   of 2014 but many keep the files of 2017;
4. for an image without a ``file_name``, the file of its id under COCO's names.

Backslashes are treated as slashes and names are compared in Unicode NFC. No name leads out of the folder, as only
listed files are opened: leading slashes are ignored, a drive ("C:") is compared like a folder, and ".." removes the
component before it. Images with different names never share a file, unless they are names of the same COCO image.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

# COCO_train2014_000000000009.jpg, 000000000009.jpg, and REFER's own COCO_train2014_000000000009_4.jpg. Names that add
# words to the twelve digits do not match: they may be crops, masks or depth maps of that image.
_COCO = re.compile(r"(?:COCO_[A-Za-z]+[0-9]{4}_0{6}([0-9]{6})(?:_[0-9]{1,4})?|0{6}([0-9]{6}))(?:\.[A-Za-z]+)?")
_COCO_NAMES = ("{:012d}.jpg", "COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg")
_MAX_COMPARED = 8  # equally good candidates up to which they are compared with each other, which takes time

Key = str | int
"""File name of an image, or its id if it has none."""


class Match(NamedTuple):
    """The file of an image.

    Attributes:
        path: its listed path, None if there is no file.
        reason: why there is no file, "" if there is one.
        shared: number of trailing components that name and path have in common.
        unmatched: number of leading components of the name that the path does not have.
        in_other_folder: whether the file is in another folder than the name says ("b/x.png" for "a/x.png").
        ambiguous: whether there is no file because of several equally good matches.
    """

    path: str | None
    reason: str = ""
    shared: int = 0
    unmatched: int = 0
    in_other_folder: bool = False
    ambiguous: bool = False


def parts_of(name: str) -> tuple[str, ...]:
    """Split a path into components in NFC, resolving "." and ".."; a ".." at its start is dropped."""
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
    """COCO number of a file name or URL (its query is ignored) in COCO's or REFER's format, None for other names."""
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
        paths: paths relative to the folder, with forward slashes; a path given twice (a zip may have two such
            members) is ambiguous.
        root: components of the folder's own path; a ``file_name`` may start with the last of them.
        link_targets: path of a link to a folder -> path under which the folder's files are listed, "" for the root.
        same_file: returns whether several paths are the same file on disk.
    """

    def __init__(
        self,
        paths: Iterable[str],
        root: Sequence[str] = (),
        link_targets: Mapping[str, str] | None = None,
        same_file: Callable[[Sequence[str]], bool] = lambda paths: False,
    ) -> None:
        self._root, self._link_targets, self._same_file = tuple(root), dict(link_targets or {}), same_file
        # last component -> paths; those with a hidden component are kept apart
        self._visible: dict[str, list[str]] = {}
        self._hidden: dict[str, list[str]] = {}
        # caches: (hidden, suffix) -> component before it -> paths; suffix -> paths with no hidden component before it
        self._grouped: dict[tuple[bool, str], dict[str, list[str]]] = {}
        self._visible_parents: dict[str, list[str]] = {}
        for path in sorted(paths):
            parts = parts_of(path)
            if parts:
                table = self._hidden if any(map(is_hidden, parts)) else self._visible
                table.setdefault(parts[-1], []).append(path)

    def __len__(self) -> int:
        return sum(len(paths) for table in (self._visible, self._hidden) for paths in table.values())

    def __getstate__(self) -> dict:  # for pickling to workers, without the caches
        return {**self.__dict__, "_grouped": {}, "_visible_parents": {}}

    def locate(self, images: Iterable[tuple[int, str]]) -> dict[Key, Match]:
        """Find the files of all images of a list.

        The list must be complete, as a file goes to the image that matches it best, and the others get none.

        Args:
            images: ids and file names ("" for none).

        Returns:
            File name or id -> match.
        """
        matches: dict[Key, Match] = {}
        for image_id, name in images:
            key: Key = name or image_id
            if key not in matches:
                matches[key] = self._match_name(name) if name else self._match_number(image_id)
        owners: dict[str, list[Key]] = {}
        for key, match in matches.items():
            if match.path is not None:
                owners.setdefault(match.path, []).append(key)
        for path, keys in owners.items():
            if len(keys) > 1:
                _resolve_conflict(path, keys, matches)
        return matches

    def _match_name(self, name: str) -> Match:
        parts = parts_of(name)
        if not parts:
            return Match(None, "not a file name")
        match = self._match_exact_path(name, parts)
        if match is None and (inside := self._inside_root(parts)):
            match = self._match_exact_path(name, inside)
        match = match or self._match_longest_suffix(parts)
        if match is None and (number := coco_number(name)) is not None:
            match = self._match_number(number)
        return match or Match(None, "no file of that name")

    def _inside_root(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Remove the end of the folder's own path from the start of a name ("images/x.png" in .../images).

        Returns:
            The rest, with as many components removed as possible; () if the name does not start so.
        """
        for count in range(min(len(parts) - 1, len(self._root)), 0, -1):
            if parts[:count] == self._root[len(self._root) - count :]:
                return parts[count:]
        return ()

    def _match_number(self, number: int) -> Match:
        """Match the first of COCO's names of a COCO number that has a file."""
        names = [form.format(number) for form in _COCO_NAMES]
        for name in names:
            if match := self._match_longest_suffix((name,)):
                return match
        return Match(None, f"no file {', '.join(names[:-1])} or {names[-1]}")

    def _match_exact_path(self, name: str, parts: tuple[str, ...]) -> Match | None:
        """Match the path ``parts`` of a name exactly, also through a link to a folder that is listed elsewhere."""
        for candidate in dict.fromkeys((parts, self._resolve_links(parts))):
            paths = self._files_at(candidate)
            if 1 < len(paths) <= _MAX_COMPARED and paths.count(name) == 1:
                paths = [name]  # the others have the name in another Unicode normalization
            if paths:
                return self._to_match(paths, parts, len(parts))
        return None

    def _resolve_links(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Replace links to folders in a path by the paths under which the folders are listed."""
        path: list[str] = []
        for part in parts:
            path.append(part)
            target = self._link_targets.get("/".join(path))
            if target is not None:
                path = list(parts_of(target))
        return tuple(path)

    def _files_at(self, parts: tuple[str, ...]) -> list[str]:
        """Files with exactly this path; several if it is listed twice or in several Unicode normalizations."""
        if not parts:
            return []
        hidden = any(map(is_hidden, parts))
        table = self._hidden if hidden else self._visible
        paths, shared = self._narrow(hidden, parts, table.get(parts[-1], []))
        if shared < len(parts):
            return []
        # `paths` end in `parts`; return those that have nothing before it
        if len(paths) == 1:
            return paths if len(parts_of(paths[0])) == shared else []
        return self._group_by_parent(hidden, parts, paths).get("", [])

    def _match_longest_suffix(self, parts: tuple[str, ...]) -> Match | None:
        """Match the file with the longest common suffix, a hidden one first if the name has a hidden component."""
        for hidden in (True, False):
            table = self._hidden if hidden else self._visible
            if parts[-1] not in table or (hidden and not any(map(is_hidden, parts))):
                continue
            paths, shared = self._narrow(hidden, parts, table[parts[-1]])
            if hidden:
                paths = self._without_hidden_parents(parts[-shared:], paths)
            if paths:
                return self._to_match(paths, parts, shared)
        return None

    def _narrow(self, hidden: bool, parts: tuple[str, ...], paths: list[str]) -> tuple[list[str], int]:
        """Those of ``paths``, whose last components are equal, with the longest suffix of ``parts``, and its length."""
        shared = 1
        while len(paths) > 1 and shared < len(parts):
            deeper = self._group_by_parent(hidden, parts[-shared:], paths).get(parts[-shared - 1])
            if not deeper:
                break
            paths, shared = deeper, shared + 1
        if len(paths) == 1:
            shared = _common_suffix_length(parts, parts_of(paths[0]))
        return paths, shared

    def _group_by_parent(self, hidden: bool, suffix: tuple[str, ...], paths: list[str]) -> dict[str, list[str]]:
        """Group files with a common suffix by the component before it, "" if there is none.

        Cached, so that looking up a hundred thousand files of the same name does not go through all of them each time.
        """
        key = (hidden, "/".join(suffix))
        if key not in self._grouped:
            groups: dict[str, list[str]] = {}
            for path in paths:
                parents = parts_of(path)[: -len(suffix)]
                groups.setdefault(parents[-1] if parents else "", []).append(path)
            self._grouped[key] = groups
        return self._grouped[key]

    def _without_hidden_parents(self, suffix: tuple[str, ...], paths: list[str]) -> list[str]:
        """Files with a common suffix that have no hidden component before it; cached if ``paths`` are several."""
        key = "/".join(suffix)
        if len(paths) == 1 or key not in self._visible_parents:
            visible = [path for path in paths if not any(map(is_hidden, parts_of(path)[: -len(suffix)]))]
            if len(paths) == 1:
                return visible
            self._visible_parents[key] = visible
        return self._visible_parents[key]

    def _to_match(self, paths: list[str], parts: tuple[str, ...], shared: int) -> Match:
        """The match of a name with equally good ``paths``, which end in the last ``shared`` of its ``parts``."""
        if len(paths) > 1 and not (len(paths) <= _MAX_COMPARED and self._same_file(paths)):
            more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
            which = f"duplicate {paths[0]}" if paths[0] == paths[1] else f"{paths[0]}, {paths[1]}{more}"
            return Match(None, f"ambiguous file name: {which}", ambiguous=True)
        # The folder of a file at the top is the root itself, as in `_inside_root`.
        full_path = (*self._root, *parts_of(paths[0]))
        parent = full_path[len(full_path) - shared - 1] if len(full_path) > shared else None
        unmatched = len(parts) - shared
        in_other_folder = unmatched > 0 and parent is not None and parts[unmatched - 1] != parent
        return Match(paths[0], "", shared, unmatched, in_other_folder)


def _resolve_conflict(path: str, keys: list[Key], matches: dict[Key, Match]) -> None:
    """Let the image that matches a file best keep it; the others get no file.

    All keep it if they are the same COCO image; if several different names match equally well, none does.

    Args:
        path: the file.
        keys: the images that match it, by name or id.
        matches: name or id -> match, changed in place.
    """
    number = coco_number(path)
    numbers = {key if isinstance(key, int) else coco_number(key) for key in keys}
    if number is not None and numbers == {number}:
        return
    names = {key: parts_of(key) if isinstance(key, str) else (str(key),) for key in keys}
    best = max((matches[key].shared, -matches[key].unmatched) for key in keys)
    owners = [key for key in keys if (matches[key].shared, -matches[key].unmatched) == best]
    rivals = list({names[key]: key for key in owners}.values())  # "a//x.png" and "a/x.png" are one
    owner_set = set(owners)
    for key in keys:
        if key not in owner_set:
            named = "" if owners[0] == path else f", {owners[0]}"
            matches[key] = Match(None, f"the best match, {path}, is the file of another image in the list{named}")
        elif len(rivals) > 1:
            reason = f"ambiguous match: {rivals[0]} and {rivals[1]} match {path} equally well"
            matches[key] = Match(None, reason, ambiguous=True)


def _common_suffix_length(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """Number of components at the end that two paths have in common."""
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count
