"""`EvaluationData`: images and annotations to evaluate a detector on. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_source import ImageSource
from refdet.errors import InputError
from refdet.structures.coco_categories import used_categories

_SHOWN = 3  # categories that an error message names


@dataclass(frozen=True)
class EvaluationData:
    """Images and annotations to evaluate a detector on.

    Attributes:
        index: the instances file, indexed.
        source: folder or zip with the images; each of them has been found.
    """

    index: CocoIndex
    source: ImageSource

    @classmethod
    def open(
        cls,
        instances: Path,
        images: Path,
        exif: str = "ignore",
        crowd_as_object: bool = False,
        images_argument: str = "images",
    ) -> EvaluationData:
        """Read an instances file and find its images.

        Args:
            instances: COCO instances JSON.
            images: folder or zip of its images.
            exif: "ignore" or "apply" the EXIF orientation of the images.
            crowd_as_object: take annotations of ``iscrowd`` 1 as objects.
            images_argument: name of the argument that gave ``images``, for messages.

        Raises:
            InputError: the file is invalid or has no images, or an image is missing.
        """
        index = CocoIndex.load(instances, crowd_as_object=crowd_as_object)
        source = ImageSource.open(images, exif, images_argument)
        if not index.images:
            raise InputError(f"{instances}: has no images to evaluate on")
        source.check(list(index.images.values()), instances)
        return cls(index, source)

    @property
    def records(self) -> list[ImageRecord]:
        """The images, in file order."""
        return list(self.index.images.values())

    def check_categories(self, categories: Sequence[tuple[int, str]], owner: str) -> None:
        """Check that the instances file has the same categories as a detector.

        Args:
            categories: COCO category id and name of each of the detector's classes.
            owner: what the detector's categories are read from, for the error message.

        Raises:
            InputError: they differ.
        """
        detector_categories, dataset_categories = used_categories(dict(categories)), self.index.categories
        if detector_categories != dataset_categories:
            differing = sorted(set(detector_categories.items()) ^ set(dataset_categories.items()))
            shown = ", ".join(f"{id_} {name}" for id_, name in differing[:_SHOWN])
            shown += ", ..." if len(differing) > _SHOWN else ""
            raise InputError(
                f"{owner} has other classes than {self.index.path} ({len(detector_categories)} and "
                f"{len(dataset_categories)}; {shown}); evaluate on the dataset it was trained for"
            )
