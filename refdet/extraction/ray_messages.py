"""Messages between the driver of `refdet.extraction.ray_engine` and its workers. Imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from refdet.data.coco import ImageRecord
from refdet.errors import RefdetError, RuntimeFailure
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.steps import Compute, Load, Stamp, no_stamp
from refdet.store import Header, ImageRow
from refdet.store.shard_file import BlockLocation
from refdet.structures.regions import Regions

RegionsById = Mapping[int, Regions]  # image id -> its regions, without features


@dataclass(frozen=True)
class Tools:
    """The functions and settings that a worker computes with.

    Attributes:
        load: loads an image.
        compute: starts computing a batch.
        device: description of the device, such as "cuda NVIDIA H100".
        precision: arithmetic of the network: the requested one, or float32 if the device does not support it.
        kernels: description of the kernels of `refdet.ops` in use.
        threads: number of threads that prefetch images.
        auto_batch_size: returns the number of images that fit into memory.
        context: returns a context manager in which ``compute`` and ``auto_batch_size`` are called.
        compute_seconds: returns the seconds per part of the network.
        orientations: file name -> EXIF orientation, of the images that were read and have one.
        stamp_of: returns the stamp of the file of an image that was loaded, given the id of the image.
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
    orientations: Mapping[str, int] = field(default_factory=dict)
    stamp_of: Callable[[int], Stamp] = no_stamp


class MakeTools(Protocol):
    """Prepares a worker; the driver sends it to the worker by pickle."""

    def __call__(self, given_regions: Callable[[ImageRecord], Regions], /) -> Tools:
        """Check what the worker needs and load the detector.

        Args:
            given_regions: returns the regions of an image of the shard being computed, if the driver sent them.

        Raises:
            InputError: something that the worker needs is missing or differs from the driver's.
        """


@dataclass(frozen=True)
class Started:
    """Message of a worker that has started: its host and process id, and values of its `Tools`."""

    host: str
    pid: int
    device: str
    precision: str
    kernels: str


@dataclass(frozen=True)
class Failed:
    """Message that a worker or its work failed.

    Attributes:
        message: the reason, one line.
        is_machine_error: whether the worker's machine is the cause, so that another worker may succeed.
        kind: the exception that the driver raises.
    """

    message: str
    is_machine_error: bool
    kind: type[RefdetError] = RuntimeFailure


@dataclass(frozen=True)
class Work:
    """What a worker needs to know about the shards of an extraction.

    Attributes:
        folder: folder of the shards, which the worker may or may not see.
        token: random text that the driver wrote into the folder, by which a worker recognizes the folder.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard.
        plan_hash: hash of the plan, to write to each shard.
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
        number: number of the shard.
        rows: row in the store and location in the shard of each of its images.
        shapes: feature -> shape per region.
        file: the shard, as a temporary file in the folder of the extraction, which the driver renames, or as the
            contents of the file.
        orientations: file name -> EXIF orientation, of the images that the worker has read so far and have one.
        notes: warnings that the worker has logged since its previous shard.
    """

    number: int
    rows: list[tuple[ImageRow, BlockLocation]]
    shapes: dict[str, tuple[int, ...]]
    file: Path | bytes
    orientations: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
