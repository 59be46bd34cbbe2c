"""Regions of all images of an instances file, detected on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from refdet import store
from refdet.data.coco import CocoIndex
from refdet.errors import InputError, Interrupted, RefdetError, UnusableImageError
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)


def regions_on_ray(
    run: Path,
    index: CocoIndex,
    images: Path,
    ray: str,
    *,
    batch_size: int | None,
    device: str | None,
    precision: str,
    workers: int | None,
    exif: str,
    crowd_as_object: bool,
) -> Iterator[Regions]:
    """Detect regions as `refdet.evaluation.detection.detect_regions` does, but by an extraction on a Ray cluster.

    The extraction writes a store without features to a temporary folder, from which the regions are read.

    Args:
        run: run directory of the detector.
        index: the instances file.
        images: folder or zip of its images, at a path where the workers find them too.
        ray: the cluster, as in `refdet.extraction.extract.extract_features`.
        batch_size: images per batch; None for the default of the device.
        device: "cpu", "cuda"; None for GPUs if the cluster has any.
        precision: arithmetic of the network.
        workers: threads of each worker that read images ahead.
        exif: "ignore" or "apply" the EXIF orientation of the images.
        crowd_as_object: whether ``index`` was read with annotations of ``iscrowd`` 1 as objects.

    Yields:
        The regions of each image.

    Raises:
        InputError: the cluster cannot be used, or an image cannot be read.
        RuntimeFailure: no worker is left, or has too little memory for an image.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP.
    """
    image_list = ImageList(list(index.images.values()), index, index.path.name, crowd_as_object)
    options = ExtractOptions(features=(), precision=precision, exif=exif, crowd_as_object=crowd_as_object)
    with TemporaryDirectory(prefix="refdet-") as folder:
        out = Path(folder) / "regions.h5"
        try:
            extract_features(
                run,
                images,
                out,
                image_list,
                options=options,
                batch_size=batch_size,
                workers=workers,
                device=device or "auto",
                ray=ray,
                strict=True,
                say=log.warning,
                announce=log.info,
            )
        except Interrupted:  # replaces the message that finished shards are kept, as they are deleted here
            raise Interrupted("interrupted") from None
        except UnusableImageError as error:
            raise InputError(error.message) from error
        except RefdetError as error:
            if error.fix:  # which says how to resume the extraction, but its shards are deleted here
                error.fix = "run it again"
            raise
        with store.open(out) as computed:
            for image_id in computed:
                yield computed.read(image_id)
