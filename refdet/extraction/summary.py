"""`Summary`: the result of an extraction."""

from __future__ import annotations

from dataclasses import dataclass, field

from refdet.extraction.timing import shares


@dataclass(frozen=True)
class Summary:
    """Result of an extraction.

    Attributes:
        images: number of images in the store.
        regions: number of regions in the store.
        errors: number of unusable images.
        computed: number of images computed by this run.
        seconds: duration of computing them.
        bytes: size of the store.
        images_per_second: of this run, without the merge; 0 if nothing was computed.
        stages: seconds per stage: load (waiting for images), compute and wait (for the background threads) in the
            main thread, finish and write in a background thread each, and merge at the end.
        batch_size: maximum number of images per batch.
        computing: seconds per part of computing, if measured (`refdet.detector.profiler`).
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

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of this run's time spent in each stage, 0 to 1."""
        return shares(self.seconds, self.stages)
