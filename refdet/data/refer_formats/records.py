"""What the readers of the formats return: refs and instances, with the fields that a format has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from refdet.data.coco_validation import is_finite
from refdet.errors import InputError
from refdet.files.short_text import short_repr


@dataclass
class SourceSentence:
    """An expression; attributes are None for what the format lacks.

    Attributes:
        sent: the expression as REFER cleaned it; or else as the format has it.
        raw: the expression as the annotator typed it.
        tokens: the words of ``sent``.
        sent_id: id of the sentence.
    """

    sent: str
    raw: str | None = None
    tokens: list[str] | None = None
    sent_id: int | None = None


@dataclass
class SourceRef:
    """A ref, or one sentence of a ref, as a format has it; attributes are None or "" for what the format lacks.

    Attributes:
        where: file and row, for error messages.
        split: name of the split in the source.
        sentences: its expressions.
        dataset: such as "refcoco".
        split_by: such as "unc".
        image_id: COCO id of the image.
        file_name: name of the image as the format has it.
        ref_id: id of the ref.
        ann_id: id of the COCO annotation.
        likely_ann_id: what is probably ``ann_id``, used only to choose between annotations with the same box.
        category_id: COCO id of the category.
        box: four numbers, in one of `Source.layouts`.
    """

    where: str
    split: str
    sentences: list[SourceSentence]
    dataset: str = ""
    split_by: str = ""
    image_id: int | None = None
    file_name: str | None = None
    ref_id: int | None = None
    ann_id: int | None = None
    likely_ann_id: int | None = None
    category_id: int | None = None
    box: list[float] | None = None


@dataclass
class SourceInstances:
    """Parts of a COCO instances file that a format includes.

    Attributes:
        images: image id -> entry.
        annotations: annotation id -> entry.
        header: other fields of the file, such as ``categories``.
        complete: whether all annotations of the images are included, or only the referred ones.
    """

    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[int, dict[str, Any]] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    complete: bool = False


@dataclass
class Source:
    """The contents of one file.

    Attributes:
        format: name of the format, for messages.
        refs: its refs.
        one_sentence_each: whether each entry of ``refs`` is a sentence, so that the entries of an object are one ref.
        layouts: the keys of `layouts.LAYOUTS` that the boxes may have.
        ref_file_names: whether ``file_name`` of the refs is REFER's own, with the number of the ref; else it is the
            name of the image.
        instances: the part of COCO's instances that it includes.
        notes: human-readable notes about what was skipped or replaced.
    """

    format: str
    refs: list[SourceRef]
    one_sentence_each: bool = False
    layouts: tuple[str, ...] = ()
    ref_file_names: bool = False
    instances: SourceInstances = field(default_factory=SourceInstances)
    notes: list[str] = field(default_factory=list)


class Row:
    """An entry of a source file, whose fields are checked as they are read.

    Args:
        where: file and position of the entry, for error messages.
        value: the entry.

    Raises:
        InputError: the entry is not a dictionary.
    """

    def __init__(self, where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise InputError(f"{where}: {short_repr(value)} is not an object with fields")
        self.where, self.value = where, value

    def integer(self, key: str) -> int:
        """Read an integer field of at most 64 bits; integers in strings are accepted."""
        value = self._get(key)
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:  # at most the digits of 64 bits
            value = int(value)
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise InputError(f"{self.where}: {key!r} is {short_repr(value)}; it must be an integer")
        return value

    def parse_integers(self, *keys: str) -> None:
        """Convert those of the fields that are strings to integers, in place: so they are compared and written."""
        for key in keys:
            if isinstance(self.value.get(key), str):
                self.value[key] = self.integer(key)

    def text(self, key: str) -> str:
        """Read a text field."""
        value = self._get(key)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {key!r} is {short_repr(value)}; it must be text")
        return value

    def items(self, key: str) -> list[Any]:
        """Read a list field."""
        value = self._get(key)
        if not isinstance(value, list):
            raise InputError(f"{self.where}: {key!r} is {short_repr(value)}; it must be a list")
        return value

    def entry(self, key: str) -> Row:
        """Read an object field."""
        return Row(f"{self.where}: {key!r}", self._get(key))

    def box(self, key: str) -> list[float]:
        """Read a field with four finite numbers."""
        value = self.items(key)
        if len(value) != 4 or not all(map(is_finite, value)):
            raise InputError(f"{self.where}: {key!r} is {short_repr(value)}; it must be four numbers")
        return [float(number) for number in value]

    def texts(self, key: str) -> list[str]:
        """Read a field with a list of strings."""
        value = self.items(key)
        if not all(isinstance(text, str) for text in value):
            raise InputError(f"{self.where}: {key!r} is {short_repr(value)}; it must be a list of strings")
        return value

    def optional(self, key: str, read: Callable[[str], Any]) -> Any:
        """Read a field with ``read``, one of the methods above; None if the entry has no value for the field."""
        return None if self.value.get(key) is None else read(key)

    def _get(self, key: str) -> Any:
        if key not in self.value:
            raise InputError(f"{self.where}: no {key!r}")
        return self.value[key]
