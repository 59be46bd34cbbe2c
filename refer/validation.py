"""Check the fields of records, column by column for speed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from .errors import ReferDataError

Types = type | tuple[type, ...]

_REF: dict[str, Types] = {
    "ref_id": int,
    "ann_id": int,
    "category_id": int,
    "image_id": int,
    "split": str,
    "sentences": list,
}
_GENERALIZED: dict[str, Types] = _REF | {"ann_id": list, "category_id": list}
_REF_OPTIONAL: dict[str, Types] = {"file_name": str, "sent_ids": list}
_SENTENCE: dict[str, Types] = {"sent_id": int, "sent": str, "tokens": list}
_SENTENCE_OPTIONAL: dict[str, Types] = {"raw": str}
_MAX_DEPTH = 16
_MAX_COORDINATE = 1e9  # pixels
_MAX_ID_LENGTH = 64


def check_refs(path: Path, refs: Any, generalized: bool, ann_id_type: Types = int) -> None:
    """Check the refs of a file.

    Args:
        path: the file, for error messages.
        refs: its contents.
        generalized: whether ``ann_id`` and ``category_id`` are lists.
        ann_id_type: type of annotation ids, unless ``generalized``.

    Raises:
        ReferDataError: a missing field or one of the wrong type, an id of more than 64 bits, a duplicate ref id, text
            that cannot be encoded, or an unknown field that is nested too deeply; the message names the ref.
    """
    if not isinstance(refs, list):
        raise ReferDataError(f"{path}: contains a {type(refs).__name__}, not a list of refs")
    required = _GENERALIZED if generalized else _REF | {"ann_id": ann_id_type}
    check_fields(path, "ref number {}", refs, required, _REF_OPTIONAL)
    check_ids(path, "ref_id", [ref["ref_id"] for ref in refs])
    if ann_id_type is not int:  # of RefClef; several refs may have the same annotation
        check_ids(path, "ann_id", list(dict.fromkeys(ref["ann_id"] for ref in refs)))
    sentences = list(chain.from_iterable(map(itemgetter("sentences"), refs)))
    words = _words(refs, sentences)
    if words is None:  # find the sentence and field for the message
        for ref in refs:
            what = f"a sentence of ref {ref['ref_id']}"
            check_fields(path, what, ref["sentences"], _SENTENCE, _SENTENCE_OPTIONAL)
    _check_lists_of_ids(path, refs, generalized)
    if path.suffix == ".json":  # integers of pickles have at most 64 bits
        _check_int64(path, "image_id", list(map(itemgetter("image_id"), refs)))
        _check_int64(path, "sent_id", list(map(itemgetter("sent_id"), sentences)))
    for split in {ref["split"] for ref in refs}:
        if not split.isprintable():  # as it appears in reports and messages
            raise ReferDataError(f"{path}: invalid split name {_short_repr(split)}")
    if not _is_text(words):
        for ref in refs:
            if not _is_text(_words([ref], ref["sentences"])):
                raise ReferDataError(f"{path}: ref {ref['ref_id']}: token is not a string or has an unpaired surrogate")
    if not _KNOWN_FIELDS.issuperset(chain.from_iterable(chain(refs, sentences))):
        for ref in refs:
            for entry in (ref, *ref["sentences"]):
                _check_unknown_fields(path, ref, entry)


def check_fields(
    path: Path, what: str, entries: Sequence[Any], required: dict[str, Types], optional: dict[str, Types] | None = None
) -> None:
    """Check the fields of entries.

    Args:
        path: the file, for error messages.
        what: name of an entry for error messages, with ``{}`` for its position.
        entries: the entries.
        required: required fields and their types.
        optional: optional fields and their types.

    Raises:
        ReferDataError: an entry is not a dictionary, or lacks a field or has one of the wrong type.
    """
    optional = optional or {}
    if _are_valid(entries, required, optional):
        return
    for position, entry in enumerate(entries):
        where = what.replace("{}", str(position))
        if not isinstance(entry, dict):
            raise ReferDataError(f"{path}: {where} is a {type(entry).__name__}; it must be a dictionary")
        for key, expected in (required | {key: expected for key, expected in optional.items() if key in entry}).items():
            value = entry.get(key)
            if type(value) not in _types(expected):  # not isinstance, which accepts bool for int
                problem = f"is {_short_repr(value)}" if key in entry else "is missing"
                names = " or ".join(sorted(type_.__name__ for type_ in _types(expected)))
                raise ReferDataError(f"{path}: {where}: {key!r} {problem}; it must be of type {names}")


def check_ids(path: Path, what: str, ids: Sequence[Any]) -> None:
    """Check that ids are unique, and have at most 64 bits or are short, printable strings.

    Args:
        path: the file, for error messages.
        what: name of the ids, for error messages.
        ids: the ids.

    Raises:
        ReferDataError: a duplicate or invalid id.
    """
    texts = [id_ for id_ in ids if type(id_) is str]
    for text in texts:
        if not (text.isprintable() and len(text) <= _MAX_ID_LENGTH):
            raise ReferDataError(f"{path}: {what} {_short_repr(text)} is not valid")
    _check_int64(path, what, [id_ for id_ in ids if type(id_) is int] if texts else ids)
    if len(set(ids)) < len(ids):
        seen: set[Any] = set()
        for id_ in ids:
            if id_ in seen:
                raise ReferDataError(f"{path}: {what} {id_} is a duplicate; keep only one")
            seen.add(id_)


def _check_lists_of_ids(path: Path, refs: Sequence[dict[str, Any]], generalized: bool) -> None:
    """Check the ids in the fields of refs that are lists."""
    for key in ("sent_ids", "ann_id", "category_id") if generalized else ("sent_ids",):
        values = [ref[key] for ref in refs if key in ref]
        if not set(map(type, chain.from_iterable(values))) <= {int}:
            wrong = next(ref["ref_id"] for ref in refs if not set(map(type, ref.get(key, ()))) <= {int})
            raise ReferDataError(f"{path}: ref {wrong}: {key!r} must contain only integers")
        _check_int64(path, key, list(chain.from_iterable(values)))


def _check_int64(path: Path, what: str, ids: Sequence[int]) -> None:
    """Raise ReferDataError if an integer has more than 64 bits."""
    if ids and (min(ids) < -(2**63) or max(ids) >= 2**63):
        raise ReferDataError(f"{path}: {what} {_short_repr(max(ids, key=abs))} has more than 64 bits")


def _types(kind: Types) -> set[type]:
    return set(kind) if isinstance(kind, tuple) else {kind}


def _are_valid(entries: Sequence[Any], required: dict[str, Types], optional: dict[str, Types]) -> bool:
    """Whether all entries are dictionaries with fields of these types: a fast check that does not say what is wrong."""
    if not set(map(type, entries)) <= {dict}:
        return False
    try:
        required_are_valid = all(
            set(map(type, map(itemgetter(key), entries))) <= _types(kind) for key, kind in required.items()
        )
    except KeyError:
        return False
    return required_are_valid and all(
        {type(entry[key]) for entry in entries if key in entry} <= _types(kind) for key, kind in optional.items()
    )


def _words(refs: Sequence[dict[str, Any]], sentences: Sequence[Any]) -> list[Any] | None:
    """All values that must be strings: file names, sentences and tokens, which are not checked yet.

    Returns:
        The values; None if a sentence lacks a field or has one of the wrong type.
    """
    words: list[Any] = [ref.get("file_name", "") for ref in refs]
    try:
        for sentence in sentences:  # a single pass, as every pass loads all sentences from memory
            sent_id, text, tokens, raw = (
                sentence["sent_id"],
                sentence["sent"],
                sentence["tokens"],
                sentence.get("raw", ""),
            )
            if type(sent_id) is not int or type(text) is not str or type(tokens) is not list or type(raw) is not str:
                return None
            words.append(text)
            words.append(raw)
            words += tokens
    except (AttributeError, KeyError, TypeError, IndexError):
        return None
    return words


def _is_text(words: list[Any] | None) -> bool:
    """Whether all values are strings without unpaired surrogates."""
    try:
        text = "".join(words or ())
        return text.isascii() or bool(text.encode())
    except (TypeError, UnicodeEncodeError):
        return False


def _check_unknown_fields(path: Path, ref: dict[str, Any], entry: dict[Any, Any]) -> None:
    """Raise ReferDataError if an unknown field of ``entry``, a ref or sentence, is nested too deeply or recursive."""
    for key in entry.keys() - _KNOWN_FIELDS:
        if not _is_shallow(entry[key], _MAX_DEPTH, set()):
            raise ReferDataError(f"{path}: ref {ref['ref_id']}: {_short_repr(key)} is nested too deeply or recursive")


def _is_shallow(value: Any, levels: int, seen: set[tuple[int, int]]) -> bool:
    """Whether a value has at most ``levels`` nested containers; ``seen`` holds what is already checked."""
    if not isinstance(value, list | tuple | dict | set | frozenset) or (id(value), levels) in seen:
        return True
    if levels == 0:
        return False
    seen.add((id(value), levels))  # shared values are visited once per level
    return all(_is_shallow(item, levels - 1, seen) for item in (value.values() if isinstance(value, dict) else value))


def _short_repr(value: Any) -> str:
    # The repr of nested values can take forever.
    if isinstance(value, str):
        return ascii(value[:40])
    return f"{value!r:.40}" if isinstance(value, int | float | None) else f"a {type(value).__name__}"


_KNOWN_FIELDS = frozenset(_REF) | frozenset(_REF_OPTIONAL) | frozenset(_SENTENCE) | frozenset(_SENTENCE_OPTIONAL)


def box_of(where: str, annotation: Any) -> list[float]:
    """Return the box of an annotation, ``[x, y, width, height]`` in pixels; raises ReferDataError if it has none."""
    box = annotation.get("bbox")
    if box is None:
        raise ReferDataError(f"{where}: annotation {annotation['id']} has no bbox")
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        raise ReferDataError(f"{where}: bbox of annotation {annotation['id']} is not four numbers")
    if not all(-_MAX_COORDINATE < value < _MAX_COORDINATE for value in box):
        raise ReferDataError(f"{where}: bbox of annotation {annotation['id']} is not finite")
    return box
