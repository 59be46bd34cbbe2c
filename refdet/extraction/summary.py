"""`Summary`: the result of an extraction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from refdet import store
from refdet.errors import RuntimeFailure
from refdet.extraction.timing import STAGES, Timer, shares
from refdet.files.short_text import format_count


@dataclass(frozen=True)
class Summary:
    """Result of an extraction.

    Attributes:
        images: number of images in the store.
        regions: number of regions in the store.
        errors: number of unusable images.
        computed: number of images computed by this run.
        seconds: seconds that this run spent computing images, without the merge.
        bytes: size of the store.
        images_per_second: ``computed / seconds``; 0 if nothing was computed.
        stages: seconds per stage: in the main thread "load" (waiting for images), "compute", and "wait" (for the
            background threads); in one background thread each "finish" and "write"; and "merge" at the end.
        batch_size: maximum number of images per batch.
        computing: seconds per part of the network, if measured (`refdet.detector.profiler`).
        merged: whether the store is written. Otherwise this process has finished its part of the extraction, and
            ``images``, ``regions``, ``errors`` and ``bytes`` are of the shards of that part.
    """

    images: int
    regions: int
    errors: int
    computed: int
    seconds: float
    bytes: int
    images_per_second: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    batch_size: int = 0
    computing: dict[str, float] = field(default_factory=dict)
    merged: bool = True

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of this run's time spent in each stage, 0 to 1."""
        return shares(self.seconds, self.stages)


def summarize_store(
    out: Path, timer: Timer | None, compute_seconds: Callable[[], dict[str, float]], batch_size: int
) -> Summary:
    """Summarize a finished store and what this process computed for it.

    Args:
        out: the store.
        timer: timing of this process; None if there was nothing to compute.
        compute_seconds: returns the seconds per part of the network.
        batch_size: maximum number of images per batch.

    Raises:
        RuntimeFailure: no image of the store could be used.
    """
    with store.open(out) as finished:
        images, regions, errors = len(finished), finished.regions, finished.errors
    if errors and len(errors) == images:
        raise none_usable_error(errors, kept=f"{out} has no regions")
    computed, seconds = (timer.images, timer.seconds) if timer else (0, 0.0)
    return Summary(
        images=images,
        regions=regions,
        errors=len(errors),
        computed=computed,
        seconds=seconds,
        bytes=out.stat().st_size,
        images_per_second=computed / seconds if computed else 0.0,
        stages=timer.stages if timer else dict.fromkeys(STAGES, 0.0),
        batch_size=batch_size,
        computing=compute_seconds(),
    )


def none_usable_error(errors: Mapping[int, str], kept: str) -> RuntimeFailure:
    """Create the error of an extraction without usable images.

    Args:
        errors: image id -> reason.
        kept: what the extraction leaves behind, such as "finished shards are kept in a.h5.parts".
    """
    return RuntimeFailure(
        f"none of {format_count(len(errors), 'image')} could be used (first: {next(iter(errors.values()))})",
        fix=f"{kept}, check the files or `images` and run it again with `resume=True`",
    )
