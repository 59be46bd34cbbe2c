"""Plan of an extraction: what is computed, and its division into shards. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refdet.config.renamed_keys import rename_old_keys
from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.extraction.selection_record import claims_no_more, merge_provenances, recorded_provenance
from refdet.files.short_text import shorten
from refdet.store.schema import Columns, Header

Shard = list[list[ImageRecord]]  # batches in order of computation

_HEADER_CHANGES = {"recipe": "another recipe", "classes": "other classes", "provenance": "another provenance"}
# options that are stored only if they differ from these defaults
_DEFAULTS = {"exif": "ignore", "box_format": "xywh", "crowd_as_object": False}
_HASH_CHANGES = {
    "boxes_sha256": "another file of boxes",
    "instances_sha256": "another instances file",
    "image_list_sha256": "another image list",
    "checkpoint_sha256": "another checkpoint",
}
# stored name -> name in messages, if that is not the argument of the same name
_SHOWN_NAMES = {"at_least_one": "`lower_threshold_if_empty`", "image_list": "the image list"}
_MAX_CHANGES = 3  # shown keys of a recipe


@dataclass(frozen=True)
class Plan:
    """What is computed: everything that determines the contents of the store, and the batch size.

    Attributes:
        options: options as stored; extractions with equal options write the same contents.
        features: names of the feature columns, such as "fc7".
        dtype: of features and maps, "float16" or "float32".
        masks: whether masks are stored.
        ann_ids: whether annotation ids are stored.
        batch_size: maximum number of images per batch; 0 if not chosen yet. Not in ``options``, as it depends on the
            machine and affects results only by rounding, but shards of different batch sizes cannot be combined.
        maps: names of the feature maps stored for each image.
        compression: of features and maps, "none", "gzip" or "lzf".
    """

    options: dict[str, Any]
    features: tuple[str, ...]
    dtype: str
    masks: bool
    ann_ids: bool
    batch_size: int
    maps: tuple[str, ...] = ()
    compression: str = "none"

    def columns(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Columns:
        """Columns of the store, given the shape per region of each feature, (0,) where unknown."""
        feature_shapes = {name: (shapes or {}).get(name, (0,)) for name in self.features}
        return Columns(feature_shapes, self.dtype, self.masks, self.ann_ids, self.maps, self.compression)

    def differences(self, other: dict[str, Any], ignored: Container[str] = ()) -> str:
        """Describe the differences of the options from those of an earlier plan.

        Args:
            other: options of the earlier plan.
            ignored: names of options that may differ.

        Returns:
            A human-readable description, "" if there is no difference.
        """
        lines = []
        new_options = json.loads(json.dumps(self.options))  # turns tuples into lists, as on disk
        for name in [*new_options, *(key for key in other if key not in new_options)]:
            old, new = (options.get(name, _DEFAULTS.get(name)) for options in (other, new_options))
            if old == new or name in ignored:
                continue
            shown = _SHOWN_NAMES.get(name, f"`{name}`")
            lines.append(_HASH_CHANGES.get(name) or f"{shown} was {_short_value(old)} and is now {_short_value(new)}")
        return "; ".join(lines)

    def to_json(self, shards: Sequence[Shard], header: Header) -> dict[str, Any]:
        """Contents of ``plan.json``: the plan, its division into shards, and the store's header."""
        return {
            "options": self.options,
            "batch_size": self.batch_size,
            **self._layout(shards),
            "header": {name: getattr(header, name) for name in _HEADER_CHANGES},
        }

    def differing_options(self, header: Header, other: Mapping[str, Any], ignored: Container[str] = ()) -> str:
        """Describe the differences from the options, header and batch size in an earlier ``plan.json``.

        A plan of a version that did not store the recipe, classes and provenance counts as different, as its shards
        may be of another detector. The batch size is compared unless that of this plan is 0.

        Args:
            header: metadata of the store.
            other: contents of the earlier ``plan.json``.
            ignored: names of options that may differ.

        Returns:
            A human-readable description, "" if there is no difference.
        """
        if not isinstance(other.get("options"), dict) or not isinstance(other.get("header"), dict):
            return "another version of refdet"
        saved_header = other["header"] | {"provenance": recorded_provenance(other)}
        difference = self.differences(other["options"], ignored) or header_differences(header, saved_header)
        if not difference and self.batch_size and other.get("batch_size") != self.batch_size:
            return f"`batch_size` was {_short_value(other.get('batch_size'))} and is now {self.batch_size}"
        return difference

    def differing_shards(self, shards: Sequence[Shard], other: Mapping[str, Any]) -> str:
        """Say that an earlier ``plan.json`` divides the images into other shards, "" if into the same."""
        layout = self._layout(shards)
        return "" if all(other.get(name) == layout[name] for name in ("shards", "shards_sha256")) else "other shards"

    def _layout(self, shards: Sequence[Shard]) -> dict[str, Any]:
        """The division into shards: number of shards and images, and hash of the image ids in each batch."""
        ids = "\n".join(";".join(",".join(str(r.id) for r in batch) for batch in shard) for shard in shards)
        return {
            "shards": len(shards),
            "images": sum(len(batch) for shard in shards for batch in shard),
            "shards_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        }


def header_differences(header: Header, other: Mapping[str, Any], written: bool = False) -> str:
    """Describe the differences of the recipe, classes and provenance from earlier ones.

    They come from a checkpoint's ``model.json``, which can change while the weights stay the same. How the weights were
    selected may differ (`refdet.extraction.selection_record`), unless a store would claim more than is known now.

    Args:
        header: metadata of the store, with the current ones.
        other: the earlier recipe, classes and provenance.
        written: whether the earlier ones are in a complete store, which cannot record another selection.

    Returns:
        A human-readable description, "" if there is no difference.
    """
    differences = []
    for name, text in _HEADER_CHANGES.items():
        old, new = other.get(name), json.loads(json.dumps(getattr(header, name)))
        details = ""
        if name == "recipe":
            old, new = _parse_recipe(old), _parse_recipe(new)
            changes = list(_list_changes(old, new))
            details = f" ({'; '.join(changes[:_MAX_CHANGES])}{'; ...' if len(changes) > _MAX_CHANGES else ''})"
        if name == "classes" and header.options.get("regions") in ("annotations", "boxes"):
            details = " or of the given regions"
        if name == "provenance" and merge_provenances(old, new) is not None:
            if not written or claims_no_more(old, new):
                continue
            text = "another selection by validation, or none recorded,"
        if old != new:
            differences.append(f"{text} of the checkpoint{details}")
    return "; ".join(differences)


def _parse_recipe(recipe: Any) -> Any:
    """Parse the JSON text of a recipe and rename old keys; anything else is returned unchanged."""
    try:
        return rename_old_keys(json.loads(recipe))[0]
    except (TypeError, ValueError, RecursionError, InputError):
        return recipe


def _list_changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Describe each difference between two JSON objects at the dotted key ``name``, "" for the whole recipe."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield f"{name or 'the recipe'} was {_short_value(old)} and is now {_short_value(new)}"
        return
    for key in [*new, *(key for key in old if key not in new)]:
        yield from _list_changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)


def split_into_shards(batches: Sequence[list[ImageRecord]], images: int) -> list[Shard]:
    """Group batches into shards.

    Args:
        batches: the batches.
        images: number of images at which a shard is complete.

    Returns:
        The shards.
    """
    shards: list[Shard] = []
    shard_size = images  # so that the first batch starts a shard
    for batch in batches:
        if shard_size >= images:
            shards.append([])
            shard_size = 0
        shards[-1].append(batch)
        shard_size += len(batch)
    return shards


def _short_value(value: object) -> str:
    """The value of an option in a message."""
    if value is None:
        return "not set"
    return shorten(value if isinstance(value, str) else json.dumps(value))
