"""The plan of an extraction, fixed before the first image is read: what is computed, in which shards. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refdet.config.renamed_keys import current
from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.store.schema import Header

Shard = list[list[ImageRecord]]  # its batches, in the order of the work

_HEADER = {"recipe": "another recipe", "classes": "other classes", "provenance": "another provenance"}
_UNSAID = {"exif": "ignore"}  # options that are kept only where they have another value
_OPTIONS = {"at_least_one": "lower_threshold_if_empty"}  # which are called otherwise on the command line
_LONGEST = 80  # characters of a value that are shown
_SHOWN = 3  # changed parts of a recipe that are named


@dataclass(frozen=True)
class Plan:
    """What is being computed: all that decides the contents of the store, and the batch size.

    Attributes:
        options: names and values as they are kept in the store; two extractions with equal options give the
            same file.
        features, dtype, masks, ann_ids, maps, compression: the columns, see `refdet.store.Columns`.
        batch_size: images of a batch at most. It is no option of the store: on another machine another one is right,
            and what a batch computes differs by rounding alone. But shards of two batch sizes do not fit together.
    """

    options: dict[str, Any]
    features: tuple[str, ...]
    dtype: str
    masks: bool
    ann_ids: bool
    batch_size: int
    maps: tuple[str, ...] = ()
    compression: str = "none"

    def differences(self, other: dict[str, Any], undecided: Container[str] = ()) -> str:
        """What differs from another plan's options but for those undecided, for people; "" where nothing does."""
        told = []
        mine = json.loads(json.dumps(self.options))  # tuples become lists, as they did on disk
        for name in [*mine, *(key for key in other if key not in mine)]:
            old, new = (options.get(name, _UNSAID.get(name)) for options in (other, mine))
            if old == new or name in undecided:
                continue
            if name.endswith("_sha256"):
                told.append(f"another {name.removesuffix('_sha256').replace('_', ' ')}")
            else:
                told.append(
                    f"--{_OPTIONS.get(name, name).replace('_', '-')} was {_shown(old)} and is now {_shown(new)}"
                )
        return "; ".join(told)

    def work(self, shards: Sequence[Shard], header: Header) -> dict[str, Any]:
        """The plan with its cut into shards and what the store will say of itself, as ``plan.json`` keeps it."""
        return {
            "options": self.options,
            "batch_size": self.batch_size,
            **self._cut(shards),
            "header": {name: getattr(header, name) for name in _HEADER},
        }

    def other_options(self, header: Header, other: Mapping[str, Any], undecided: Container[str] = ()) -> str:
        """What differs from the options and header that another ``plan.json`` holds, for people; "" where nothing does.

        A plan of a refdet that did not keep the recipe, classes and provenance in it is of another version: nobody
        knows whether its shards are of the same detector. A batch size is compared where one was chosen.
        """
        if not isinstance(other.get("options"), dict) or not isinstance(other.get("header"), dict):
            return "by another version of refdet"
        told = self.differences(other["options"], undecided) or header_differences(header, other["header"])
        if not told and self.batch_size and other.get("batch_size") != self.batch_size:
            return f"--batch-size was {_shown(other.get('batch_size'))} and is now {self.batch_size}"
        return told

    def other_shards(self, shards: Sequence[Shard], other: Mapping[str, Any]) -> str:
        """Whether the work of another ``plan.json`` was cut into other shards, for people; "" where it was not."""
        mine = self._cut(shards)
        return "" if all(other.get(name) == mine[name] for name in ("shards", "shards_sha256")) else "in other shards"

    def _cut(self, shards: Sequence[Shard]) -> dict[str, Any]:
        cut = "\n".join(";".join(",".join(str(r.id) for r in batch) for batch in shard) for shard in shards)
        return {
            "shards": len(shards),
            "images": sum(len(batch) for shard in shards for batch in shard),
            "shards_sha256": hashlib.sha256(cut.encode()).hexdigest(),
        }


def header_differences(header: Header, other: Mapping[str, Any]) -> str:
    """What differs from the recipe, classes and provenance of ``other``, for people; "" where nothing does.

    They come of a checkpoint's ``model.json``, which may change while the weights stay what they are.
    """
    told = []
    for name, text in _HEADER.items():
        old, new = other.get(name), json.loads(json.dumps(getattr(header, name)))
        if name == "recipe":
            old, new = _parsed(old), _parsed(new)
        if old != new:
            parts = list(_changed(old, new))
            named = "; ".join(parts[:_SHOWN]) + ("; ..." if len(parts) > _SHOWN else "")
            told.append(f"{text} of the checkpoint ({named})" if name == "recipe" else f"{text} of the checkpoint")
    return "; ".join(told)


def _parsed(recipe: Any) -> Any:
    """A recipe's JSON in today's keys, whichever refdet wrote it; what is none as it is."""
    try:
        return current(json.loads(recipe))[0]
    except (TypeError, ValueError, RecursionError, InputError):
        return recipe


def _changed(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """The parts in which two JSON objects differ, each with its dotted name."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield f"{name or 'it'} was {_shown(old)} and is now {_shown(new)}"
        return
    for key in [*new, *(key for key in old if key not in new)]:
        yield from _changed(old.get(key), new.get(key), f"{name}.{key}" if name else key)


def cut_into_shards(batches: Sequence[list[ImageRecord]], images: int) -> list[Shard]:
    """Batches in shards: one is closed when it has so many images."""
    shards: list[Shard] = []
    size = images
    for batch in batches:
        if size >= images:
            shards.append([])
            size = 0
        shards[-1].append(batch)
        size += len(batch)
    return shards


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
