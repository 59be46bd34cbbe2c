"""What the driver of `refdet.extraction.ray_engine` and its workers send each other. Knows neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from refdet.data.coco import ImageRecord
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.steps import Compute, Load
from refdet.store import Header, ImageRow
from refdet.store.shard_file import BlockLocation
from refdet.structures.regions import Regions

RegionsById = Mapping[int, Regions]  # image id -> its regions, without features


@dataclass(frozen=True)
class Tools:
    """What a worker computes with.

    Attributes:
        load: loads an image.
        compute: computes a batch.
        device: description of the device, such as "cuda NVIDIA H100".
        precision: arithmetic that the device has of what was asked for.
        kernels: which kernels compute, as `refdet.ops` describes them.
        threads: number of threads that prefetch images.
        auto_batch_size: the number of images that fit into memory.
        context: context manager to compute in.
        compute_seconds: returns the seconds per part of computing.
        oriented: files read that have an EXIF orientation.
    """

    load: Load
    compute: Compute
    device: str = "cpu"
    precision: str = "float32"
    kernels: str = ""
    threads: int = 2
    auto_batch_size: Callable[[], int] = lambda: 1
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    compute_seconds: Callable[[], dict[str, float]] = dict
    oriented: Mapping[str, int] = field(default_factory=dict)


class MakeTools(Protocol):
    """Prepares a worker; pickled to get to it."""

    def __call__(self, given: Callable[[ImageRecord], Regions]) -> Tools:
        """Check what the worker needs and load the detector; ``given`` returns the regions of an image if any are."""


@dataclass(frozen=True)
class Started:
    """A worker that is ready, on which machine, and some of its `Tools`."""

    host: str
    pid: int
    device: str
    precision: str
    kernels: str


@dataclass(frozen=True)
class Failed:
    """A worker or its work failed.

    Attributes:
        message: the reason, one line.
        is_machine_error: whether its machine is the cause, so that another worker may succeed.
        bad_input: whether the reason is invalid input.
    """

    message: str
    is_machine_error: bool
    bad_input: bool = False


@dataclass(frozen=True)
class Work:
    """The shards of an extraction, as a worker needs them.

    Attributes:
        folder: folder of the shards, which the worker may or may not see.
        token: what the driver wrote into the folder.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard.
        plan_hash: identity of the plan in the shards.
        strict: fail at an unusable image.
    """

    folder: Path
    token: str
    plan: Plan
    header: Header
    shards: Sequence[Shard]
    plan_hash: str
    strict: bool


@dataclass(frozen=True)
class Finished:
    """A finished shard.

    Attributes:
        number: its number.
        rows: its images.
        shapes: feature -> shape per region.
        file: its file in the folder, under a name that the driver changes, or its contents.
        oriented: files read so far that have an EXIF orientation.
        notes: what the worker logged since it finished another shard.
    """

    number: int
    rows: list[tuple[ImageRow, BlockLocation]]
    shapes: dict[str, tuple[int, ...]]
    file: Path | bytes
    oriented: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
