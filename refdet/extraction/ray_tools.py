"""Prepare a worker of `refdet.extraction.ray_engine`: check that it has the same software, checkpoint and images."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.extraction.options import ExtractOptions
from refdet.files.version import __version__
from refdet.structures.regions import Regions

if TYPE_CHECKING:
    from refdet.data.image_source import ImageSource
    from refdet.extraction.job import Job
    from refdet.extraction.ray_messages import Tools
    from refdet.extraction.stamped_source import StampedSource


@cache
def software() -> str:
    """Versions that a worker must have in common with the driver, with a hash of refdet's Python sources."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"refdet {__version__} (sources {digest.hexdigest()[:8]}), torch {version('torch')}"


def images_sha256(source: ImageSource, records: list[ImageRecord]) -> str:
    """SHA-256 of the ids of images, the names of their files and, in a zip, the sizes of the files."""
    digest, zipped = hashlib.sha256(), source.path.is_file()
    for record in records:
        name = source.find(record)
        size = source.size(name) if zipped and name is not None else None
        digest.update(f"{record.id}\t{name!r}\t{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class DetectorTools:
    """Prepares a worker; see `refdet.extraction.ray_messages.MakeTools`.

    Attributes:
        checkpoint: run directory of the detector.
        checkpoint_sha256: hash of the weights.
        recipe: recipe of the detector, JSON.
        categories: categories of the detector, (COCO id, name) each.
        images: folder or zip of the images.
        images_sha256: hash of the image files, from the function `images_sha256`.
        records: the images.
        list_records: all images of the instances file that ``records`` are from, to find the files by the same rule.
        options: what to compute.
        regions_given: whether the driver sends the regions with each shard; otherwise they are detected.
        device: "cpu" or "cuda".
        software: versions that the worker must have, from the function `software`.
        workers: number of threads that prefetch images; None for the default of the device.
    """

    checkpoint: Path
    checkpoint_sha256: str
    recipe: str
    categories: tuple[tuple[int, str], ...]
    images: Path
    images_sha256: str
    records: list[ImageRecord]
    list_records: list[ImageRecord]
    options: ExtractOptions
    regions_given: bool
    device: str
    software: str
    workers: int | None

    @classmethod
    def from_job(cls, job: Job, device: str, workers: int | None) -> DetectorTools:
        """Create the tools for the workers of an extraction."""
        return cls(
            checkpoint=job.checkpoint.absolute(),
            checkpoint_sha256=job.plan.options["checkpoint_sha256"],
            recipe=job.header.recipe,
            categories=job.meta.categories,
            images=job.source.path.absolute(),
            images_sha256=images_sha256(job.source, job.records),
            records=job.records,
            list_records=list(job.image_list.index.images.values()),
            options=job.options,
            regions_given=job.given_regions is not None,
            device=device,
            software=software(),
            workers=workers,
        )

    def __call__(self, given_regions: Callable[[ImageRecord], Regions]) -> Tools:
        """Check the software, checkpoint and images of this machine, and load the detector.

        Raises:
            InputError: something is missing or differs from the driver's.
        """
        host = socket.gethostname()
        if software() != self.software:
            raise InputError(f"{host} has {software()}, the driver {self.software}; install the same software there")
        source = self._check_files(host)

        import torch

        from refdet.detector import loading
        from refdet.detector.profiler import Profiler
        from refdet.device import describe_device, resolve_device, supported_precision
        from refdet.extraction.batch_size import auto_batch_size
        from refdet.extraction.computing import make_compute
        from refdet.extraction.defaults import default_workers
        from refdet.extraction.ray_messages import Tools
        from refdet.ops._library import describe_kernels

        device = resolve_device(self.device)
        if device.type == "cpu":
            torch.set_num_threads(1)  # a slot is one CPU core, and rounding depends on the number of threads
        precision = supported_precision(self.options.precision, device)
        detector = loading.load(self.checkpoint, device, for_inference=True, precision=precision)
        self._check_checkpoint(host)  # again, as the file may have been replaced since `_check_files`
        detector.model.profiler = profiler = Profiler(device)
        name, _, _ = describe_device(self.device).partition(" (")  # without details
        name += ", 1 thread each" if device.type == "cpu" else ""
        return Tools(
            load=source.read,
            compute=make_compute(detector, self.options, given_regions if self.regions_given else None),
            device=name,
            precision=precision,
            kernels=describe_kernels(),
            threads=self.workers or default_workers(device),
            auto_batch_size=partial(auto_batch_size, detector, self.records, self.options, self.options.features),
            context=detector.inference,
            compute_seconds=profiler.seconds,
            orientations=source.orientations,
            stamp_of=source.stamp_of,
        )

    def _check_checkpoint(self, host: str) -> None:
        """Raise an InputError if the checkpoint is missing or differs from the driver's."""
        from refdet.detector.checkpoint import MODEL, load_meta, run_directory
        from refdet.structures.provenance import file_sha256

        try:
            weights = run_directory(self.checkpoint) / MODEL
        except InputError:
            problem = f"`checkpoint` {self.checkpoint}: not found on {host}"
            raise InputError(f"{problem}; copy it there or use a shared file system") from None
        meta = load_meta(self.checkpoint)
        same = meta.categories == self.categories and json.dumps(meta.recipe.to_dict()) == self.recipe
        if not same or file_sha256(weights) != self.checkpoint_sha256:
            raise InputError(f"`checkpoint` {self.checkpoint}: a different one on {host}; copy the same one there")

    def _check_files(self, host: str) -> StampedSource:
        """Compare the checkpoint and the images with the driver's, and return the located images."""
        from refdet.extraction.stamped_source import StampedSource

        self._check_checkpoint(host)
        if not self.images.exists():
            raise InputError(
                f"`images` {self.images}: not found on {host}; copy the zip there or use a shared file system"
            )
        source = StampedSource.open(self.images, self.options.exif)
        missing = source.locate(self.records, self.list_records)
        if images_sha256(source, self.records) != self.images_sha256:
            first = f"; missing there: {len(missing)}, first {missing[0]}" if missing else ""
            raise InputError(
                f"`images` {self.images}: holds different files on {host}{first}; copy the same ones there"
            )
        return source
