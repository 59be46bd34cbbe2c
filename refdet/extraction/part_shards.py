"""`PartShards` and `PartTimer`: the shards of one part of an extraction, and the progress of the part. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refdet.extraction.part import Part
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.shards import ShardSet
from refdet.extraction.summary import Summary
from refdet.extraction.timing import Timer
from refdet.store import Header


class PartShards(ShardSet):
    """The shards of one part; created by `refdet.extraction.parts.open_part`."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        header: Header,
        shards: Sequence[Shard],
        saved_plan: Mapping[str, Any],
        part: Part,
    ) -> None:
        self.part = part
        super().__init__(out, plan, header, shards, saved_plan=saved_plan, shard_numbers=part.shards(len(shards)))

    def discard(self, numbers: Sequence[int]) -> None:
        """Remove the files of the given shards, if they are finished, to compute them again."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)
            self._rows.pop(number, None)

    def summary(self, timer: Timer, compute_seconds: dict[str, float]) -> Summary:
        """Summarize this part, whose store is not written yet."""
        rows = [row for shard in self._rows.values() for row, _ in shard]
        num_bytes = sum(path.stat().st_size for path in map(self._path, self._rows) if path.exists())
        return Summary(
            images=len(rows),
            regions=sum(row.regions for row in rows),
            errors=len(self.errors),
            computed=timer.images,
            seconds=timer.seconds,
            bytes=num_bytes,
            images_per_second=timer.images / timer.seconds if timer.images else 0.0,
            stages=timer.stages,
            batch_size=self.plan.batch_size,
            computing=compute_seconds,
            merged=False,
        )


class PartTimer(Timer):
    """Timing of one part, which also writes the part's progress for other processes to read."""

    def __init__(self, shard_set: PartShards) -> None:
        self._shard_set = shard_set
        super().__init__(shard_set.folder, shard_set.part.number)
        self.report("computing")

    def record_shard(self, images: int) -> None:
        """Like `Timer.record_shard`, and report the progress."""
        super().record_shard(images)
        self.report("computing")

    def report(self, state: str) -> None:
        """Write the progress of the part, in the state "computing" or "finished"."""
        speed = self.images / self.seconds if self.images else 0.0
        self._shard_set.part.write_progress(
            self._shard_set.folder,
            state=state,
            finished=self._shard_set.finished_images,
            images=self._shard_set.images,
            images_per_second=round(speed, 2),
        )
