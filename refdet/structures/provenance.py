"""`Provenance`: the training data of a detector, copied from split to checkpoint to store to metrics."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.short_text import format_count, short_repr
from refdet.structures.known_weights import TRAINING_SETS, KnownFile, TrainingSet, imported_note

UNKNOWN = "not built by refdet build-split: nothing is known to be excluded"
UNKNOWN_DATA = "training data unknown"
NAMES_DIFFER = "its file names do not match its image ids"
"""Part of the note of a split whose `image_ids_sha256` says nothing, as its images may not be those with these ids."""


@dataclass(frozen=True)
class Provenance:
    """The source of the training images and the REFER splits excluded from them.

    Attributes:
        source: name of the original instances file, or of the training set of a published file. For imported weights
            with unknown training data, the source and the hashes are empty, and the counts 0.
        source_sha256: SHA-256 of the instances file.
        images: number of training images.
        annotations: number of training annotations.
        image_ids_sha256: `image_ids_sha256` of the training images.
        excluded: "refcoco/unc/val" -> {"images": number of images in that split, "found": how many of them the source
            has}.
        weights: the weights that training started from: their directory and, in parentheses, their hash and their own
            provenance in one line; or None.
        note: a human-readable note, or "".
        selection: how the weights of a training run were selected; None for a split, for imported weights, and for
            weights of an older refdet, which did not record it.
    """

    source: str
    source_sha256: str
    images: int
    annotations: int
    image_ids_sha256: str
    excluded: dict[str, dict[str, int]] = field(default_factory=dict)
    weights: str | None = None
    note: str = ""
    selection: Selection | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object; without ``selection`` if it is None, as in older files."""
        tree = asdict(replace(self, selection=None))
        del tree["selection"]
        return tree if self.selection is None else {**tree, "selection": self.selection.to_json()}

    @classmethod
    def from_json(cls, value: object) -> Provenance:
        """The inverse of `to_json`; InputError if a field is missing, unknown or of the wrong type."""
        if not isinstance(value, dict):
            raise InputError(f"provenance must be an object, not {type(value).__name__}")
        names = [f.name for f in fields(cls)]
        missing = [name for name in names if name not in value and name != "selection"]
        unknown = [str(name) for name in value if name not in names]
        if missing or unknown:
            raise InputError(f"provenance: fields missing: {missing}, fields unknown: {short_repr(unknown)}")
        selection = Selection.from_json(value["selection"]) if "selection" in value else None
        result = cls(**{**value, "selection": selection})
        hashes_valid = all(_is_hash(value[name]) for name in ("source_sha256", "image_ids_sha256"))
        counts_valid = all(map(_is_count, (result.images, result.annotations)))
        texts_valid = isinstance(result.source, str) and isinstance(result.note, str)
        if not (hashes_valid and counts_valid and texts_valid and isinstance(result.weights, str | None)):
            raise InputError("provenance: a field has the wrong type; build the split again")
        if not _is_excluded(result.excluded):
            raise InputError("provenance: 'excluded' has the wrong type; build the split again")
        return result

    @classmethod
    def imported(cls, name: str, sha256: str, known: KnownFile | None = None) -> Provenance:
        """Provenance of an imported checkpoint.

        Args:
            name: name of the imported file.
            sha256: SHA-256 of the file.
            known: the published file that it is, whose training set is known; None if the training data is unknown.
        """
        if known is None:
            return cls("", "", 0, 0, "", note=f"imported: {name}, sha256 {sha256}, {UNKNOWN_DATA}")
        data = known.trained_on
        return cls(data.name, "", data.images, 0, "", note=imported_note(name, sha256, known))

    @property
    def training_set(self) -> TrainingSet | None:
        """The published training set of an imported published file, None for other weights."""
        return TRAINING_SETS.get(self.source) if self.is_unknown else None

    @property
    def is_unknown(self) -> bool:
        """Whether the ids of the training images are unknown, as for all imported weights."""
        return not self.image_ids_sha256

    def with_weights(self, text: str) -> Provenance:
        """A copy with ``weights`` set."""
        return replace(self, weights=text)

    def one_line(self) -> str:
        """A human-readable summary in one line."""
        if self.is_unknown:
            return self.note
        parts = [f"{format_count(self.images, 'image')} of {self.source}"]
        if self.excluded:
            parts.append("without " + ", ".join(sorted(self.excluded)))
        parts.append(f"ids {self.image_ids_sha256[:12]}")
        if self.weights:
            parts.append(f"started from {self.weights}")
        if self.selection is not None and self.selection.validated_on:
            parts.append(self.selection.one_line())
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)


@dataclass(frozen=True)
class Selection:
    """How the weights of a training run were selected.

    Attributes:
        by_validation: True for the weights with the highest AP on ``validated_on``, which is then a single file; False
            for those of the last step, whether or not they were validated.
        validated_on: provenance of each file that the run was validated on.
    """

    by_validation: bool
    validated_on: tuple[Provenance, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {"by_validation": self.by_validation, "validated_on": [file.to_json() for file in self.validated_on]}

    @classmethod
    def from_json(cls, value: object) -> Selection:
        """The inverse of `to_json`; InputError if a field is missing, unknown or of the wrong type."""
        tree = value if isinstance(value, dict) and value.keys() == {"by_validation", "validated_on"} else {}
        by_validation, entries = tree.get("by_validation"), tree.get("validated_on")
        if type(by_validation) is not bool or not isinstance(entries, list):
            raise InputError(
                f"provenance: selection: by_validation and validated_on are needed, not {short_repr(value)}"
            )
        if any(isinstance(entry, dict) and "selection" in entry for entry in entries):
            raise InputError("provenance: selection: a validation file cannot have a selection itself")
        files = tuple(map(Provenance.from_json, entries))
        if any(file.is_unknown for file in files) or (by_validation and len(files) != 1):
            raise InputError("provenance: selection: the file that was validated on is missing or unknown")
        return cls(by_validation, files)

    def with_file(self, file: Provenance) -> Selection:
        """A copy with the provenance of one more file in ``validated_on``, unless it is there already."""
        return self if file in self.validated_on else replace(self, validated_on=(*self.validated_on, file))

    def one_line(self) -> str:
        """A human-readable summary in one line."""
        names = ", ".join(
            f"{file.source} ({format_count(file.images, 'image')}, ids {file.image_ids_sha256[:12]})"
            for file in self.validated_on
        )
        if self.by_validation:
            return f"chosen by their AP on {names}"
        return "weights of the last step" + (f", validated on {names}" if names else "")


def image_ids_sha256(ids: Iterable[int]) -> str:
    """SHA-256 of the ids in decimal, ascending, one per line, as from ``sort -n | sha256sum``."""
    return hashlib.sha256("".join(f"{i}\n" for i in sorted(ids)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_hash(value: object) -> bool:
    """Whether a value is a SHA-256 in hexadecimal, or its start; empty text, as of imported weights, also passes."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{0,64}", value) is not None


def _is_count(value: object) -> bool:
    """Whether a value is a nonnegative int64."""
    return type(value) is int and 0 <= value < 2**63


def _is_excluded(value: object) -> bool:
    """Whether a value has the type of `Provenance.excluded`."""
    return isinstance(value, dict) and all(
        isinstance(split, str)
        and isinstance(counts, dict)
        and all(isinstance(name, str) and _is_count(count) for name, count in counts.items())
        for split, counts in value.items()
    )
