"""What an entry of a list of images says about which COCO image it is of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from refdet.structures.coco_ids import LARGEST, bare_number, is_image_file, is_visual_genome, numbers_in_name
from refer.image_lookup import coco_number

NAMES = ("file_name", "filename", "coco_url", "url", "image_url", "image", "img", "path")
IDS = ("image_id", "id", "img_id")
COCO_IDS = ("coco_id", "cocoid")
# COCO's id under other keys: coco_image_id, MDETR's original_id, COCO_ID. At any depth.
_COCO_ID_KEY = re.compile(r"coco[a-z_]*id|original_(?:image_)?id", re.IGNORECASE)
_ID_KEY = re.compile(r"(?:image|img|picture|photo)[a-z_]*ids?|images?|imgs?", re.IGNORECASE)
# Visual Genome's other files do not name an image, but their entries have lists under these keys.
_GENOME_LISTS = {
    "regions": None, "relationships": None, "qas": None, "objects": "object_id", "attributes": "object_id",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one entry says.

    Attributes:
        id: the integer under which the list knows it, None for none.
        named: numbers in COCO's own form in any of its strings or keys, at any depth, and its ``coco_id``.
        bare: numbers that are all of a name: "9.jpg".
        ids: integers under id keys that its names do not contradict. Lists number their images in their own ways, so
            these prove something only where names or a ``coco_id`` in the same file confirm it (`ids_are_confirmed`).
        is_non_coco: whether a null ``coco_id`` says that the image is not COCO's.
        genome: whether it is an entry of Visual Genome's, whose numbers are its own.
        unread_names: whether it names an image by a file name or address that holds no number.
        addresses: its file names and addresses.
        looked_up: of an entry of an instances file, the number under which training may look its image up
            (`lookup_number`).
    """

    id: int | None
    named: frozenset[int]
    bare: frozenset[int]
    ids: frozenset[int]
    is_non_coco: bool
    genome: bool
    unread_names: bool
    addresses: tuple[str, ...] = ()
    looked_up: int | None = None

    @property
    def numbers(self) -> frozenset[int]:
        """The numbers under which COCO may know the image: the image is held out if any of them is."""
        return self.named | self.bare | self.ids | _coco_range([self.looked_up])

    def is_understood(self, ids_confirmed: bool) -> bool:
        """Whether it is known which COCO image the entry is of, or that it is of none.

        Args:
            ids_confirmed: whether names in the same file confirm that its ids are COCO's.
        """
        if self.unread_names:
            return False
        if self.named or self.bare or self.is_non_coco:
            return True
        return ids_confirmed and bool(self.ids)


class _Text(NamedTuple):
    """A string of an entry, the key it stands under, and whether it is one of several in a list."""

    key: str
    text: str
    listed: bool


def evidence_of(entry: Any, id_keys: Sequence[str] = IDS, key: str = "") -> Evidence:
    """The evidence in an entry: a number, a name, or an object with names and ids at any depth.

    Args:
        entry: a JSON value.
        id_keys: the keys under which the list may have its id; the first that is there counts.
        key: the key of the entry itself where it is a member of an object, "" where it is none.
    """
    if type(entry) is int and not key:  # a list of bare ids is what its user says it is
        return Evidence(entry, frozenset(), _coco_range([entry]), frozenset(), False, False, False)
    top: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    texts = [*_texts(entry), *([_Text("", key, False)] if key else [])]
    addresses = [text for text in texts if text.text and (text.key in NAMES or is_image_file(text.text))]
    given = [top[name] for name in COCO_IDS if name in top]
    coco_ids = _coco_range(_integers(entry, _COCO_ID_KEY))
    named = coco_ids.union(*(numbers_in_name(text.text) for text in texts))
    bare = frozenset(number for text in texts if text.text != key and (number := _bare(text)) is not None)
    own = next((_integer(top[name]) for name in id_keys if top.get(name) is not None), None)
    genome = _is_genome_entry(top, [text.text for text in texts])
    ids = _coco_range([own, *_integers(entry, _ID_KEY), *(_loose_integers(entry))])
    of_key = bare_number(key) if key else None
    if of_key is not None and (named or bare or ids or addresses):  # perhaps a running number
        ids |= _coco_range([of_key])
    elif of_key is not None:
        bare = frozenset([of_key])
    # Running numbers, as MDETR's: the name is that of another image. A coco_id alone does not say that of a file name.
    unread = _has_unread(addresses, bool(coco_ids))
    of_names = frozenset().union(*(numbers_in_name(text.text) for text in (*addresses, *_id_texts(texts))))
    other = genome or bool(of_names) or (bool(coco_ids) and not _has_unread(addresses, False))
    is_non_coco = bool(given) and not named
    return Evidence(
        id=own,
        named=frozenset(named),
        bare=frozenset(bare),
        ids=frozenset() if other else ids,
        is_non_coco=is_non_coco,
        genome=genome,
        unread_names=unread and not (coco_ids or is_non_coco),
        addresses=tuple(dict.fromkeys(text.text for text in addresses)),
    )


def ids_are_confirmed(entries: Iterable[Evidence]) -> bool:
    """Whether the names in a file, or its coco_ids, show that its ids are COCO's: most that can be compared agree."""
    votes = [entry.id in entry.named for entry in entries if entry.id is not None and entry.named]
    return 2 * sum(votes) > len(votes)


def evidence_of_image(entry: Mapping[str, Any], image_id: int | None) -> Evidence:
    """The evidence in an entry of an instances file's ``images``, whose id is ``image_id``."""
    evidence = evidence_of(entry, ("id", "image_id", "img_id"))
    name = entry.get("file_name")
    # training reads the file of that name, whatever the number in another address
    other_file = isinstance(name, str) and bool(name) and not numbers_in_name(name) and bare_number(name) is None
    unread = evidence.unread_names or (other_file and not evidence.is_non_coco)
    return replace(evidence, looked_up=lookup_number(entry, image_id, evidence), unread_names=unread)


def lookup_number(entry: Mapping[str, Any], image_id: int | None, evidence: Evidence | None = None) -> int | None:
    """The number under whose COCO names training may look an image up; None for none.

    It is the one in the ``file_name``, and of an entry without a ``file_name`` its id, if it goes by that.
    """
    name = entry.get("file_name")
    if isinstance(name, str) and name:
        return coco_number(name)
    return image_id if goes_by_id(entry, image_id, evidence) else None


def goes_by_id(entry: Mapping[str, Any], image_id: int | None, evidence: Evidence | None = None) -> bool:
    """Whether an entry without a ``file_name`` may be looked up by its id: nothing there says it is no COCO id."""
    evidence = evidence or evidence_of(entry, ("id",))
    return not evidence.genome and not evidence.is_non_coco and evidence.named | evidence.bare <= {image_id}


def id_matches_file_name(entry: Mapping[str, Any], image_id: int | None, evidence: Evidence | None = None) -> bool:
    """Whether the id of an entry alone tells which file training reads for it.

    Training looks an image up by its ``file_name``, and by its id only where there is none. So a hash of ids says which
    images they were only if each file name is that of its id, and nothing else in the entry contradicts.
    """
    evidence = evidence or evidence_of(entry, ("id", "image_id", "img_id"))
    if evidence.genome or evidence.is_non_coco or evidence.numbers | {image_id} != {image_id}:
        return False
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return True
    return image_id in numbers_in_name(name) or image_id == bare_number(name)


def names_in(value: Any) -> frozenset[int]:
    """The numbers in COCO's own form in any string or key of a JSON value."""
    return frozenset().union(*(numbers_in_name(text.text) for text in _texts(value)))


def _texts(value: Any) -> Iterator[_Text]:
    """All strings in a JSON value, and those keys of its objects that name an image."""
    waiting: list[_Text | tuple[str, Any, bool]] = [("", value, False)]
    while waiting:
        key, part, listed = waiting.pop()
        if isinstance(part, str):
            yield _Text(key, part, listed)
        elif isinstance(part, dict):
            for name, inner in part.items():
                if numbers_in_name(name) or is_image_file(name):
                    yield _Text("", name, listed)
                waiting.append((name, inner, listed))
        elif isinstance(part, list):
            waiting += [(key, inner, True) for inner in part]


def _has_unread(addresses: Collection[_Text], has_coco_id: bool) -> bool:
    """Whether an image is named by an address without a number.

    One image may have several addresses: beside COCO's own url others need no number, nor do urls beside a file name.
    The items of a list are images each.
    """
    numbered = {a: bool(numbers_in_name(a.text)) or _bare(a) is not None for a in addresses}
    if any(not has for a, has in numbered.items() if a.listed and "url" not in a.key):
        return True
    if has_coco_id or any(has for a, has in numbered.items() if a.key == "coco_url"):
        return False
    files = [has for a, has in numbered.items() if "url" not in a.key]
    return not all(files) if files else bool(numbered) and not any(numbered.values())


def _bare(text: _Text) -> int | None:
    """The mere number that a string is as a file name; under other keys than an image's only with a suffix."""
    return bare_number(text.text) if text.key in NAMES or text.key == "" or is_image_file(text.text) else None


def _id_texts(texts: Collection[_Text]) -> list[_Text]:
    return [text for text in texts if text.key in IDS or text.key == ""]


def _integer(value: Any) -> int | None:
    """An id, also one that is written as text or as a float."""
    if isinstance(value, str):
        return bare_number(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _integers(entry: Any, keys: re.Pattern[str]) -> Iterator[int]:
    """The integers, also in lists, under keys of a form, at any depth."""
    waiting: list[tuple[str, Any]] = [("", entry)]
    while waiting:
        key, part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.items()
        elif isinstance(part, list):
            waiting += [(key, inner) for inner in part]
        elif keys.fullmatch(key) and (number := _integer(part)) is not None:
            yield number


def _loose_integers(entry: Any) -> list[int]:
    """The integers of an entry that is a list, or of a member that is a number."""
    return [part for part in (entry if isinstance(entry, list) else [entry]) if type(part) is int]


def _coco_range(numbers: Any) -> frozenset[int]:
    return frozenset(number for number in numbers if type(number) is int and 0 <= number <= LARGEST)


def _is_genome_entry(entry: Mapping[str, Any], strings: Collection[str]) -> bool:
    if any(map(is_visual_genome, strings)):
        return True
    for key, own in _GENOME_LISTS.items():
        value = entry.get(key)
        if isinstance(value, list) and (own is None or any(isinstance(part, dict) and own in part for part in value)):
            return True
    return False
