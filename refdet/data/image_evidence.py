"""What an entry of a list of images says about which COCO image it is of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from refdet.data.coco_numbers import (
    LARGEST,
    bare_number,
    is_image_file,
    is_visual_genome,
    numbers_in_name,
)
from refer.image_lookup import coco_number

NAMES = ("file_name", "filename", "coco_url", "url", "image_url", "image", "img", "path")
IDS = ("image_id", "id", "img_id")
COCO_IDS = ("coco_id", "cocoid")
# Below the top an "id" is often of something else than an image.
_IDS_BELOW = ("image_id", "img_id", "image_ids", "img_ids")
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
        not_coco: whether a null ``coco_id`` says that the image is not COCO's.
        genome: whether it is an entry of Visual Genome's, whose numbers are its own.
        unread_names: whether it names images by file names or addresses that hold no number.
        looked_up: of an entry of an instances file, the number under which training may look its image up
            (`lookup_number`).
    """

    id: int | None
    named: frozenset[int]
    bare: frozenset[int]
    ids: frozenset[int]
    not_coco: bool
    genome: bool
    unread_names: bool
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
        if self.named or self.bare or self.not_coco:
            return True
        return ids_confirmed and bool(self.ids)


def evidence_of(entry: Any, id_keys: Sequence[str] = IDS) -> Evidence:
    """The evidence in an entry: a number, a name, or an object with names and ids at any depth.

    Args:
        entry: a JSON value.
        id_keys: the keys under which the list may have its id; the first that is there counts.
    """
    if type(entry) is int:  # a list of bare ids is what its user says it is
        return Evidence(entry, frozenset(), _coco_range([entry]), frozenset(), False, False, False)
    top: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    strings = list(_strings(entry))
    named = frozenset().union(*(numbers_in_name(text) for _, text, _ in strings))
    bare = frozenset(number for key, text, _ in strings if (number := _bare(key, text)) is not None)
    given = [top[key] for key in COCO_IDS if key in top]
    own = next((top[key] for key in id_keys if top.get(key) is not None), None)
    if isinstance(own, str):
        own = bare_number(own)
    own = own if type(own) is int else None
    genome = _is_genome_entry(top, [text for _, text, _ in strings])
    addresses = [(key, text, listed) for key, text, listed in strings if _is_address(key, text)]
    numbered = [bool(numbers_in_name(text)) or _bare(key, text) is not None for key, text, _ in addresses]
    # One image may have several addresses of which one has its number; the items of a list are images each.
    of_lists = [has for has, (_, _, listed) in zip(numbered, addresses, strict=True) if listed]
    unread = (bool(addresses) and not (named or bare)) or not all(of_lists)
    coco_ids = _coco_range(number for number in given if number is not None)
    # Running numbers, as MDETR's: the name is that of another image. A coco_id alone does not say that of a file name.
    other = genome or bool(named) or (bool(coco_ids) and not unread)
    return Evidence(
        id=own,
        named=named | coco_ids,
        bare=bare,
        ids=frozenset() if other else _coco_range([own, *_ids_below(top)]),
        not_coco=bool(given) and not coco_ids and not named,
        genome=genome,
        unread_names=unread and not (coco_ids or (given and not named)),
    )


def ids_are_confirmed(entries: Iterable[Evidence]) -> bool:
    """Whether the names in a file, or its coco_ids, show that its ids are COCO's: most that can be compared agree."""
    votes = [entry.id in entry.named for entry in entries if entry.id is not None and entry.named]
    return 2 * sum(votes) > len(votes)


def evidence_of_image(entry: Mapping[str, Any], image_id: int | None) -> Evidence:
    """The evidence in an entry of an instances file's ``images``, whose id is ``image_id``."""
    return replace(evidence_of(entry, ("id", "image_id", "img_id")), looked_up=lookup_number(entry, image_id))


def lookup_number(entry: Mapping[str, Any], image_id: int | None) -> int | None:
    """The number under whose COCO names training may look an image up; None for none.

    It is the one in the ``file_name``, and of an entry without a ``file_name`` its id, if it goes by that.
    """
    name = entry.get("file_name")
    if isinstance(name, str) and name:
        return coco_number(name)
    return image_id if goes_by_id(entry, image_id) else None


def goes_by_id(entry: Mapping[str, Any], image_id: int | None) -> bool:
    """Whether an entry without a ``file_name`` may be looked up by its id: nothing there says it is no COCO id."""
    evidence = evidence_of(entry, ("id",))
    return not evidence.genome and not evidence.not_coco and evidence.named | evidence.bare <= {image_id}


def is_known_by_id(entry: Mapping[str, Any], image_id: int | None) -> bool:
    """Whether the id of an entry alone tells which file training reads for it.

    Training looks an image up by its ``file_name``, and by its id only where there is none. So a hash of ids says which
    images they were only if each file name is that of its id, and nothing else in the entry contradicts.
    """
    evidence = evidence_of(entry, ("id", "image_id", "img_id"))
    if evidence.genome or evidence.not_coco or evidence.numbers | {image_id} != {image_id}:
        return False
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return True
    return image_id in numbers_in_name(name) or image_id == bare_number(name)


def _strings(value: Any) -> Iterator[tuple[str, str, bool]]:
    """All strings in a JSON value and all keys of its objects: the key it is under, itself, whether in a list."""
    waiting: list[tuple[str, Any, bool]] = [("", value, False)]
    while waiting:
        key, part, listed = waiting.pop()
        if isinstance(part, str):
            yield key, part, listed
        elif isinstance(part, dict):
            for name, inner in part.items():
                if numbers_in_name(name) or is_image_file(name):
                    yield "", name, False
                waiting.append((name, inner, False))
        elif isinstance(part, list):
            waiting += [(key, inner, True) for inner in part]


def _bare(key: str, text: str) -> int | None:
    """The mere number that a string is as a file name; under other keys than an image's only with a suffix."""
    return bare_number(text) if key in NAMES or key == "" or is_image_file(text) else None


def _is_address(key: str, text: str) -> bool:
    return bool(text) and (key in NAMES or is_image_file(text))


def _ids_below(entry: Mapping[str, Any]) -> Iterator[int]:
    """Integers, also in lists, under keys that image ids have below the top, or under those of images."""
    waiting: list[tuple[str, Any]] = [(key, value) for key, value in entry.items() if key != "id"]
    while waiting:
        key, part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.items()
        elif isinstance(part, list):
            waiting += [(key, inner) for inner in part]
        elif type(part) is int and (key in _IDS_BELOW or key in ("image", "images", "img", "imgs")):
            yield part


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
