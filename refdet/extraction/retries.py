"""Find the images of finished shards to compute again: repaired or added files, and replaced ones. No torch.

In an unfinished extraction, the finished shards with such images are computed again (`find_retries`). The unusable
images of a complete store are computed by `refdet.extraction.repair.repair`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, UnusableImageError
from refdet.extraction.in_threads import map_in_threads
from refdet.extraction.known_stamps import add_known_stamps, read_known_stamps
from refdet.extraction.shards import ShardSet
from refdet.extraction.stamped_source import StampedSource
from refdet.files.short_text import format_count

log = logging.getLogger(__name__)

Load = Callable[[ImageRecord], object]


def find_readable(errors: Container[int], records: Sequence[ImageRecord], load: Load) -> set[int]:
    """Find unusable images that can now be read, and report their number.

    Args:
        errors: a container of the ids of the unusable images.
        records: all images.
        load: loads an image, raising InputError if it is unusable.

    Returns:
        Ids of the unusable images that can now be read.
    """
    unusable = [record for record in records if record.id in errors]
    still = _find_unusable(load, unusable, "look for repaired images")
    readable = {record.id for record in unusable} - still.keys()
    if readable:
        log.warning("note: %s can now be read", format_count(len(readable), "previously unusable image"))
    return readable


def find_retries(
    shard_set: ShardSet,
    records: Sequence[ImageRecord],
    load: Load,
    strict: bool,
    source: StampedSource | None = None,
) -> set[int]:
    """Find the images in finished shards of an unfinished extraction to compute again.

    They are the unusable ones that can now be read, and those whose files were replaced by others that can be read.

    As a shard is always computed as a whole, a shard in which another image can no longer be read is left out, or the
    regions of that image would be lost.

    Args:
        shard_set: the shards.
        records: all images.
        load: loads an image, raising InputError if it is unusable.
        strict: fail if an image of a finished shard is still unusable, or can no longer be read.
        source: the images that ``load`` loads; None to look for no replaced ones.

    Returns:
        Ids of the images.

    Raises:
        UnusableImageError: there is such an image and ``strict`` is True; all finished shards are kept.
    """
    errors = shard_set.errors
    readable = find_readable(errors, records, load)
    kept = f"finished shards are kept in {shard_set.folder}, continue with `resume=True`"
    if strict and (still_unusable := [error for image_id, error in errors.items() if image_id not in readable]):
        raise UnusableImageError(still_unusable[0], fix=kept)
    replaced: dict[int, str] = {}
    if source is not None:
        stamps = {i: stamp for i, stamp in shard_set.stamps.items() if i not in errors}
        replaced = source.replaced(stamps, read_known_stamps(shard_set.folder))
        add_known_stamps(shard_set.folder, source.unchanged)
    numbers = sorted({*shard_set.missing_shards(readable | replaced.keys())} - {*shard_set.missing_shards()})
    checked = {  # image id -> shard and record; the regions of these images could be lost
        record.id: (number, record)
        for number in numbers
        for batch in shard_set.shards[number]
        for record in batch
        if record.id not in errors
    }
    lost = _find_unusable(load, [record for _, record in checked.values()], "check the images of their shards")
    if lost and strict:
        raise UnusableImageError(next(iter(lost.values())), fix=kept)
    if unusable := [error for image_id, error in lost.items() if image_id in replaced]:
        log.warning(
            "note: %s replaced by another file that cannot be used (first: %s); "
            "the regions of the earlier file are kept",
            format_count(len(unusable), "image", "was"),
            unusable[0],
        )
    wanted = readable | (replaced.keys() - lost.keys())
    left_out = {checked[image_id][0]: error for image_id, error in reversed(lost.items())}  # shard -> first reason
    kept_shards = {*shard_set.missing_shards(wanted)} & left_out.keys()
    if kept_shards:
        log.warning(
            "note: %s not computed again for %s images, as other images of the shard can no longer be read (first: %s)",
            format_count(len(kept_shards), "finished shard", verb="is"),
            "repaired or replaced" if replaced.keys() - lost.keys() else "repaired",
            left_out[min(kept_shards)],
        )
    wanted -= {record.id for number in left_out for batch in shard_set.shards[number] for record in batch}
    report_replaced(shard_set, {image_id: name for image_id, name in replaced.items() if image_id in wanted})
    return wanted


def report_replaced(shard_set: ShardSet, replaced: Mapping[int, str]) -> None:
    """Report the number of replaced images, image id -> file, and of the finished shards to compute again for them."""
    if replaced:
        shards = len(shard_set.missing_shards(replaced)) - len(shard_set.missing_shards())
        log.warning(
            "note: %s replaced by another file since the regions were computed (first: %s); computing %s again",
            format_count(len(replaced), "image", "was"),
            next(iter(replaced.values())),
            format_count(shards, "shard"),
        )


def _find_unusable(load: Load, records: Sequence[ImageRecord], desc: str) -> dict[int, str]:
    """Find the images that cannot be read: image id -> why, in the order of ``records``; ``desc`` is for the bar."""

    def why_unusable(record: ImageRecord) -> str:
        try:
            load(record)
        except InputError as error:
            return str(error)  # not the error, whose traceback keeps the image in memory
        return ""

    with closing(map_in_threads(why_unusable, records, desc)) as reasons:
        return {record.id: why for record, why in zip(records, reasons, strict=True) if why}
