"""What an entry of an image list says about which COCO image it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from refdet.structures.coco_ids import (
    MAX_ID,
    bare_number,
    has_other_numbering,
    is_image_file,
    is_visual_genome,
    numbers_in_name,
)
from refer.image_lookup import coco_number

# Keys of an entry whose values are names of its image, ids of its image, and COCO ids.
NAME_KEYS = ("file_name", "filename", "coco_url", "url", "image_url", "image", "img", "path")
ID_KEYS = ("image_id", "id", "img_id")
COCO_ID_KEYS = ("coco_id", "cocoid")
# Keys of COCO image ids at any depth, such as coco_image_id, COCO_ID and MDETR's original_id, but not coco_category_id
# or coco_ann_id.
_COCO_ID_KEY = re.compile(r"coco(?![a-z_]*(?:cat|ann|class|label|obj))[a-z_]*id|original_(?:image_)?id", re.IGNORECASE)
# Keys of image ids at any depth, which may be COCO's or the list's own.
_ID_KEY = re.compile(r"(?:image|img|picture|photo)[a-z_]*ids?|images?|imgs?", re.IGNORECASE)
# Entries of Visual Genome's annotation files have no image name, but a list under one of these keys. The value is a key
# that the items of that list have, None if any items will do.
_VISUAL_GENOME_LISTS = {
    "regions": None,
    "relationships": None,
    "qas": None,
    "objects": "object_id",
    "attributes": "object_id",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an entry says about which COCO image it is.

    Attributes:
        id: the entry's id in the list, None if it has none.
        coco_numbers: COCO's zero-padded numbers in any string or key of the entry, and integers under keys of COCO ids
            such as ``coco_id``, at any depth.
        bare_numbers: numbers that are an entire file name without its suffix, such as 9 in "9.jpg"; also an entry that
            is just an id, and the key of an entry without other evidence.
        possible_ids: integers under id keys, unless the entry shows that these are not COCO's. As lists may have their
            own numbering, they are COCO ids only if names or a ``coco_id`` in the same file confirm it
            (`ids_are_confirmed`).
        is_non_coco: whether the entry marks its image as not from COCO: its ``coco_id`` is null or an integer outside
            the range of COCO's ids, and it has no ``coco_numbers``.
        is_visual_genome: whether it is an entry of Visual Genome, whose ids are not COCO's.
        has_unnumbered_name: whether it may be any image, as it has a file name or URL without a number and no
            ``coco_id``. In an instances file a ``file_name`` without a number is enough, as training reads that file,
            unless ``is_non_coco``.
        addresses: its file names and URLs.
        lookup_number: for an entry of an instances file, the number by which training may look up its image (function
            `lookup_number`); else None.
    """

    id: int | None = None
    coco_numbers: frozenset[int] = frozenset()
    bare_numbers: frozenset[int] = frozenset()
    possible_ids: frozenset[int] = frozenset()
    is_non_coco: bool = False
    is_visual_genome: bool = False
    has_unnumbered_name: bool = False
    addresses: tuple[str, ...] = ()
    lookup_number: int | None = None

    @property
    def coco_ids(self) -> frozenset[int]:
        """COCO ids that the image may have; the image is held out if any of them is."""
        return self.coco_numbers | self.bare_numbers | self.possible_ids | _coco_range([self.lookup_number])

    def is_identified(self, ids_confirmed: bool) -> bool:
        """Whether the entry identifies a COCO image, or says that it is not one.

        Args:
            ids_confirmed: whether names in the same file confirm that its ids are COCO's.

        Returns:
            False if it is unknown which COCO image it is, if any.
        """
        if self.has_unnumbered_name:
            return False
        if self.coco_numbers or self.bare_numbers or self.is_non_coco:
            return True
        return ids_confirmed and bool(self.possible_ids)


class _Text(NamedTuple):
    """A string of an entry, its key ("" if it has none), and whether it is in a list."""

    key: str
    text: str
    in_list: bool


def evidence_of(entry: Any, id_keys: Sequence[str] = ID_KEYS, key: str = "") -> Evidence:
    """Collect the evidence in a list entry: a number, a name, or an object with names and ids at any depth.

    Args:
        entry: a JSON value.
        id_keys: keys that may hold the entry's id in the list; the first one with a value is used.
        key: key of the entry if the list is a JSON object; "" if it is an array.

    Returns:
        The evidence.
    """
    if type(entry) is int and not key:  # a list of bare ids is taken at face value
        return Evidence(id=entry, bare_numbers=_coco_range([entry]))
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    texts = [*_texts(entry), *([_Text("", key, False)] if key else [])]
    addresses = [text for text in texts if text.text and (text.key in NAME_KEYS or is_image_file(text.text))]
    coco_ids = _coco_range(_integers_under(entry, _COCO_ID_KEY))
    coco_numbers = coco_ids.union(*(numbers_in_name(text.text) for text in texts))
    bare_numbers = frozenset(
        number
        for text in texts
        if text.text != key and (number := _bare_number_of(text)) is not None  # the number of the key follows below
    )
    entry_id = next((_parse_integer(fields[name]) for name in id_keys if fields.get(name) is not None), None)
    ids = _coco_range([entry_id, *_integers_under(entry, _ID_KEY), *_top_level_integers(entry)])
    if key and (key_number := bare_number(key)) is not None:
        if coco_numbers or bare_numbers or ids or addresses:
            ids |= _coco_range([key_number])  # the key may just count the entries, as there is other evidence
        else:
            bare_numbers = frozenset([key_number])
    has_unnumbered = _has_unnumbered(addresses)
    is_visual_genome_entry = _is_visual_genome_entry(fields, [text.text for text in texts])
    has_own_numbering = _has_own_numbering([*addresses, *_id_texts(texts)], bool(coco_ids), has_unnumbered)
    is_elsewhere = has_other_numbering(key) or any(has_other_numbering(text.text) for text in addresses)
    is_non_coco = _has_readable_coco_id(fields) and not coco_numbers
    return Evidence(
        id=entry_id,
        coco_numbers=coco_numbers,
        bare_numbers=bare_numbers,
        possible_ids=frozenset() if is_visual_genome_entry or has_own_numbering or is_elsewhere else ids,
        is_non_coco=is_non_coco,
        is_visual_genome=is_visual_genome_entry,
        has_unnumbered_name=has_unnumbered and not (coco_ids or is_non_coco),
        addresses=tuple(dict.fromkeys(text.text for text in addresses)),
    )


def ids_are_confirmed(entries: Iterable[Evidence]) -> bool:
    """Whether most entries with a COCO number, from a name or a ``coco_id``, have it as their id.

    Entries without an id or without a COCO number are not counted; False if none is counted.
    """
    agreements = [entry.id in entry.coco_numbers for entry in entries if entry.id is not None and entry.coco_numbers]
    return 2 * sum(agreements) > len(agreements)


def evidence_of_image(entry: Mapping[str, Any], image_id: int | None) -> Evidence:
    """Collect the evidence in an entry of ``images`` in an instances file, whose id is ``image_id``."""
    evidence = evidence_of(entry, ("id", "image_id", "img_id"))
    name = entry.get("file_name")
    # Training reads the file of that name, whatever number a URL or a coco_id gives.
    is_unnumbered = isinstance(name, str) and bool(name) and not numbers_in_name(name) and bare_number(name) is None
    has_unnumbered = evidence.has_unnumbered_name or (is_unnumbered and not evidence.is_non_coco)
    number = lookup_number(entry, image_id, evidence)
    return replace(evidence, lookup_number=number, has_unnumbered_name=has_unnumbered)


def lookup_number(entry: Mapping[str, Any], image_id: int | None, evidence: Evidence | None = None) -> int | None:
    """Return the number by which training looks up an image under COCO's file names if no file has its own name.

    That is the number in the ``file_name``; without a ``file_name``, the id if `may_be_looked_up_by_id` allows it.

    Args:
        entry: an entry of ``images`` in an instances file.
        image_id: its id, None if it has none.
        evidence: its evidence, if already collected.

    Returns:
        The number, None if there is none.
    """
    name = entry.get("file_name")
    if isinstance(name, str) and name:
        return coco_number(name)
    return image_id if may_be_looked_up_by_id(entry, image_id, evidence) else None


def may_be_looked_up_by_id(entry: Mapping[str, Any], image_id: int | None, evidence: Evidence | None = None) -> bool:
    """Whether an entry without a ``file_name`` may be looked up by its id: nothing in it contradicts that COCO id."""
    evidence = evidence or evidence_of(entry, ("id",))
    if evidence.is_visual_genome or evidence.is_non_coco:
        return False
    return (evidence.coco_numbers | evidence.bare_numbers) <= {image_id}


def id_matches_file_name(entry: Mapping[str, Any], image_id: int | None, evidence: Evidence | None = None) -> bool:
    """Whether the id of an entry alone determines which image training reads for it.

    Training looks an image up by its ``file_name``, and by its id only if it has none. So a hash of ids identifies the
    images only if each file name has the number of its id and nothing else in the entry contradicts it.

    Args:
        entry: an entry of ``images`` in an instances file.
        image_id: its id, None if it has none.
        evidence: its evidence, if already collected.

    Returns:
        Whether the id is the number in the file name, if there is one, and nothing contradicts it.
    """
    evidence = evidence or evidence_of(entry, ("id", "image_id", "img_id"))
    if image_id is None or evidence.is_visual_genome or evidence.is_non_coco or not evidence.coco_ids <= {image_id}:
        return False
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return True
    return image_id in numbers_in_name(name) or image_id == bare_number(name)


def coco_numbers_in(value: Any) -> frozenset[int]:
    """Return the COCO-style numbers in any string or key of a JSON value."""
    return frozenset().union(*(numbers_in_name(text.text) for text in _texts(value)))


def _texts(value: Any) -> Iterator[_Text]:
    """Iterate over all strings in a JSON value and over keys that are image names or have COCO numbers."""
    pending: list[tuple[str, Any, bool]] = [("", value, False)]
    while pending:
        key, node, in_list = pending.pop()
        if isinstance(node, str):
            yield _Text(key, node, in_list)
        elif isinstance(node, dict):
            for name, child in node.items():
                if numbers_in_name(name) or is_image_file(name):
                    yield _Text("", name, in_list)
                pending.append((name, child, in_list))
        elif isinstance(node, list):
            pending += [(key, child, True) for child in node]


def _has_own_numbering(names: Iterable[_Text], has_coco_id: bool, has_unnumbered: bool) -> bool:
    """Whether the ids of an entry are the list's own, as in MDETR's files: a name has a COCO number, or a coco_id does.

    A coco_id says nothing about which file is read, so next to an unnumbered file name the ids stay as evidence.

    Args:
        names: names and URLs of the image, and strings that are ids.
        has_coco_id: whether the entry has a coco_id in the range of COCO's ids.
        has_unnumbered: whether the image has an unnumbered file name or URL.
    """
    return any(numbers_in_name(name.text) for name in names) or (has_coco_id and not has_unnumbered)


def _has_readable_coco_id(fields: Mapping[str, Any]) -> bool:
    """Whether an entry has a ``coco_id``, and each is null or an integer."""
    coco_ids = [fields[name] for name in COCO_ID_KEYS if name in fields]
    return bool(coco_ids) and all(value is None or _parse_integer(value) is not None for value in coco_ids)


def _has_unnumbered(addresses: Collection[_Text]) -> bool:
    """Whether an image has a file name or URL without a number, and nothing else that gives its number.

    An image may have several names: if COCO's own URL has a number, the other names need none, nor do URLs next to a
    file name. Of several URLs alone, one with a number is enough. Each file name in a list is of a separate image.
    """
    is_numbered = {
        address: bool(numbers_in_name(address.text)) or _bare_number_of(address) is not None for address in addresses
    }
    if any(not numbered for address, numbered in is_numbered.items() if address.in_list and "url" not in address.key):
        return True
    if any(numbered for address, numbered in is_numbered.items() if address.key == "coco_url"):
        return False
    files = [numbered for address, numbered in is_numbered.items() if "url" not in address.key]
    return not all(files) if files else bool(is_numbered) and not any(is_numbered.values())


def _bare_number_of(text: _Text) -> int | None:
    """The number that is an entire file name, or None; under a key that is not for names, it needs an image suffix."""
    return bare_number(text.text) if text.key in NAME_KEYS or text.key == "" or is_image_file(text.text) else None


def _id_texts(texts: Collection[_Text]) -> list[_Text]:
    """Strings under id keys, and strings without a key."""
    return [text for text in texts if text.key in ID_KEYS or text.key == ""]


def _parse_integer(value: Any) -> int | None:
    """The integer id that a value is, also as text or as a float, or None."""
    if isinstance(value, str):
        return bare_number(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _integers_under(entry: Any, keys: re.Pattern[str]) -> Iterator[int]:
    """Integers under matching keys, also in lists, at any depth."""
    pending: list[tuple[str, Any]] = [("", entry)]
    while pending:
        key, node = pending.pop()
        if isinstance(node, dict):
            pending += node.items()
        elif isinstance(node, list):
            pending += [(key, child) for child in node]
        elif keys.fullmatch(key) and (number := _parse_integer(node)) is not None:
            yield number


def _top_level_integers(entry: Any) -> list[int]:
    """Integers of an entry that is itself a list or a number."""
    return [part for part in (entry if isinstance(entry, list) else [entry]) if type(part) is int]


def _coco_range(numbers: Iterable[int | None]) -> frozenset[int]:
    """Those of the numbers that are in the range of COCO's image ids."""
    return frozenset(number for number in numbers if type(number) is int and 0 <= number <= MAX_ID)


def _is_visual_genome_entry(entry: Mapping[str, Any], strings: Collection[str]) -> bool:
    """Whether an entry has an image of Visual Genome, or one of the lists of Visual Genome's annotation files."""
    if any(map(is_visual_genome, strings)):
        return True
    for key, member_key in _VISUAL_GENOME_LISTS.items():
        value = entry.get(key)
        if isinstance(value, list) and (
            member_key is None or any(isinstance(part, dict) and member_key in part for part in value)
        ):
            return True
    return False
