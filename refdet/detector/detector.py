"""`Detector`: a trained network that detects and describes regions of images.

Shape shorthand in this module:

    n: regions of an image
    H, W: height and width of an image in pixels
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch

from refdet.config.recipe import Recipe
from refdet.data.coco import ImageRecord
from refdet.data.image_pixels import read_pixels
from refdet.data.training_batches import group_by_input_size
from refdet.detector import loading
from refdet.detector.feature_names import check_features
from refdet.detector.given_boxes import check_boxes, check_category_ids
from refdet.detector.loading import TrainedDetector
from refdet.detector.mask_rcnn import DEFAULT_FEATURES
from refdet.detector.predictor import ImageFeatures, describe_boxes, detect_batch
from refdet.device import resolve_device, supported_precision
from refdet.errors import ArgumentError, RuntimeFailure
from refdet.files.printable_text import escape_unprintable
from refdet.files.short_text import format_count, shorten
from refdet.structures.detection_options import PRECISIONS, DetectionOptions
from refdet.structures.provenance import Provenance
from refdet.structures.regions import NO_CATEGORY, Regions

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

ImageLike: TypeAlias = "np.ndarray | Image.Image | str | Path"
"""(H, W, 3) uint8 RGB, a PIL image, or the path of an image file."""
Images: TypeAlias = list[Any] | tuple[Any, ...]
"""List or tuple of `ImageLike`."""

BATCH_SIZE = 4  # images per batch, as in an extraction on a CPU
CHUNK = 64  # images of a list that are in memory at the same time, and batched by input size

_Compute = Callable[[list[np.ndarray], list[ImageRecord]], list[Regions]]


def load_detector(path: str | Path, *, device: str | torch.device = "auto", precision: str = "float32") -> Detector:
    """Load a trained detector.

    Examples:
        >>> detector = refdet.load_detector("demo/run", device="cpu")
        >>> detector
        Detector('demo/run': recipe demo, 10 classes, cpu, float32;
          trained on ... images of instances_train2014.json, 11 splits held out)

    Args:
        path: run directory, as ``refdet train`` and ``refdet import-weights`` write it.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one. A GPU becomes PyTorch's current device.
        precision: "float32" is IEEE float32, also on GPUs. "tf32" (float32 with products in TF32) and "bfloat16" are
            faster; a device without that arithmetic computes in float32, with a warning.

    Raises:
        InputError: the checkpoint is missing or damaged, or the device cannot be used.
    """
    if precision not in PRECISIONS:
        raise ArgumentError("precision", f"must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    torch_device = resolve_device(str(device))
    usable = supported_precision(precision, torch_device)
    if usable != precision:
        log.warning(
            "note: `precision` %s: this processor has no %s arithmetic; computing in %s", precision, precision, usable
        )
    trained = loading.load(path, torch_device, for_inference=True, precision=usable)
    for line in trained.meta.warnings():
        log.warning("%s", line)
    return Detector(trained)


class Detector:
    """A trained network that detects and describes regions of images; made by `load_detector`.

    It computes the same regions and features as ``refdet extract-features``.

    Attributes:
        path: its run directory.
        classes: category id -> name of the classes it detects.
        recipe: its architecture and training options.
        provenance: what data it was trained on.
        device: where it computes.
        precision: "float32", "tf32" or "bfloat16".
    """

    def __init__(self, trained: TrainedDetector) -> None:
        self.path: Path = trained.path
        self.classes: Mapping[int, str] = dict(trained.meta.categories)
        self.recipe: Recipe = trained.meta.recipe
        self.provenance: Provenance = trained.meta.provenance
        self.device: torch.device = next(trained.model.parameters()).device
        self.precision = trained.precision
        self._model, self._inference = trained.model, trained.inference

    def __repr__(self) -> str:
        provenance, count = self.provenance, len(self.classes)
        data = (
            provenance.note
            if provenance.is_unknown
            else f"trained on {format_count(provenance.images, 'image')} of {provenance.source}"
        )
        if provenance.excluded:
            data += f", {format_count(len(provenance.excluded), 'split')} held out"
        classes = format_count(count, "class")
        summary = f"recipe {escape_unprintable(self.recipe.name)}, {classes}, {self.device}, {self.precision}"
        return f"Detector({str(self.path)!r}: {summary};\n  {escape_unprintable(shorten(data, 100))})"

    @overload
    def detect(
        self,
        image: ImageLike,
        *,
        score_threshold: float = ...,
        nms_threshold: float = ...,
        max_regions: int = ...,
        lower_threshold_if_empty: bool = ...,
        features: Sequence[str] = ...,
    ) -> Regions: ...
    @overload
    def detect(
        self,
        image: Images,
        *,
        score_threshold: float = ...,
        nms_threshold: float = ...,
        max_regions: int = ...,
        lower_threshold_if_empty: bool = ...,
        features: Sequence[str] = ...,
    ) -> list[Regions]: ...
    def detect(
        self,
        image: ImageLike | Images,
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        max_regions: int = 100,
        lower_threshold_if_empty: bool = False,
        features: Sequence[str] = DEFAULT_FEATURES,
    ) -> Regions | list[Regions]:
        """Detect the objects in an image, or in each of several.

        Examples:
            >>> regions = detector.detect("image.jpg", score_threshold=0.01)
            >>> regions.boxes.shape == (len(regions), 4)
            True
            >>> [len(regions) for regions in detector.detect([image, "image.jpg"], max_regions=5)]
            [5, 5]

        Args:
            image: (H, W, 3) uint8 RGB, a PIL image or a path; or a list of these, of any sizes.
            score_threshold: lowest class probability of a detection, 0..1.
            nms_threshold: IoU above which the lower-scoring of two detections of a class is removed, 0..1.
            max_regions: detections to keep per image, best first.
            lower_threshold_if_empty: lower the score threshold of an image without detections, in steps of 0.1, until
                it has one.
            features: names of the features to compute, from `refdet.detector.feature_names`; none if empty.

        Returns:
            Boxes (n, 4) in pixels of the image, scores, categories, masks if the detector has a mask branch, and
            features. For a list of images, a list in the same order; ``image_id`` is the index in the list.

        Raises:
            ArgumentError: an image has the wrong dtype or shape, or an option is out of range.
            InputError: a file cannot be read.
            RuntimeFailure: the device has too little memory, or the network outputs NaN.
        """
        options = DetectionOptions(
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_regions=max_regions,
            lower_threshold_if_empty=lower_threshold_if_empty,
        )
        check_features(features, self.recipe)

        def compute(pixels: list[np.ndarray], records: list[ImageRecord]) -> list[Regions]:
            return detect_batch(self._model, pixels, records, list(self.classes), options, features=features)

        return self._run(image, compute)

    @overload
    def describe(
        self, image: ImageLike, boxes: Any, *, category_ids: Any = ..., features: Sequence[str] = ...
    ) -> Regions: ...
    @overload
    def describe(
        self,
        image: Images,
        boxes: Sequence[Any],
        *,
        category_ids: Any = ...,
        features: Sequence[str] = ...,
    ) -> list[Regions]: ...
    def describe(
        self,
        image: ImageLike | Images,
        boxes: Any,
        *,
        category_ids: Any = None,
        features: Sequence[str] = DEFAULT_FEATURES,
    ) -> Regions | list[Regions]:
        """Compute the features of given boxes, and their masks if category ids are given and there is a mask branch.

        Examples:
            >>> regions = detector.describe(image, [[10, 10, 60, 50], [0, 20, 30, 40]])
            >>> regions.features["fc7"].shape[0], regions.masks
            (2, None)
            >>> category = next(iter(detector.classes))
            >>> len(detector.describe(image, [[10, 10, 60, 50]], category_ids=[category]).masks)
            1

        Args:
            image: (H, W, 3) uint8 RGB, a PIL image or a path; or a list of these, of any sizes.
            boxes: (n, 4) numbers, half-open ``x1 y1 x2 y2`` in pixels of the image; they are clipped to the image. For
                a list of images, a list with the boxes of each image.
            category_ids: (n,) category ids, keys of `classes`; a detector with a mask branch gives each box the mask of
                its category. For a list of images, a list with the ids of each image.
            features: names of the features to compute, from `refdet.detector.feature_names`.

        Returns:
            The boxes with score 1 and their features. For a list of images, a list in the same order.

        Raises:
            ArgumentError: an image has the wrong dtype or shape; a box is reversed, not finite or outside its image;
                or the detector does not have a category.
            InputError: a file cannot be read.
            RuntimeFailure: the device has too little memory, or the network outputs NaN.
        """
        check_features(features, self.recipe)
        is_list = isinstance(image, list | tuple)
        if isinstance(image, list | tuple):
            _check_one_per_image("boxes", boxes, len(image))
            if category_ids is not None:
                _check_one_per_image("category_ids", category_ids, len(image))

        def compute(pixels: list[np.ndarray], records: list[ImageRecord]) -> list[Regions]:
            clipped, ids = [], []
            for record in records:
                index = record.id if is_list else None  # ids are indices in the caller's list
                with _add_index_to_errors(index):
                    clipped.append(check_boxes(_select(boxes, index), record.height, record.width))
                    if category_ids is not None:
                        ids.append(check_category_ids(_select(category_ids, index), len(clipped[-1]), self.classes))
            labels = None
            if category_ids is not None and self.recipe.model.masks:
                label_of = {category: label for label, category in enumerate(self.classes, start=1)}
                labels = [np.array([label_of[c] for c in image_ids.tolist()], np.int64) for image_ids in ids]
            image_features = describe_boxes(self._model, pixels, clipped, features=features, labels=labels)
            ids = ids or [np.full(len(rows), NO_CATEGORY, np.int64) for rows in clipped]
            return [_make_regions(*values) for values in zip(records, clipped, ids, image_features, strict=True)]

        return self._run(image, compute)

    def _run(self, image: ImageLike | Images, compute: _Compute) -> Regions | list[Regions]:
        """Apply `compute` to batches of images; returns the regions of an image, or of each image of a list."""
        if not isinstance(image, list | tuple):
            return self._run_chunk([image], None, compute)[0]
        chunks = (self._run_chunk(image[i : i + CHUNK], i, compute) for i in range(0, len(image), CHUNK))
        return [regions for chunk in chunks for regions in chunk]

    def _run_chunk(self, images: Sequence[ImageLike], first: int | None, compute: _Compute) -> list[Regions]:
        """Regions of a few images, in the same order.

        Args:
            images: images of any size; those with the same input size are batched.
            first: index of the first image in the caller's list; None for a single image.
            compute: computes the regions of a batch.
        """
        pixels: dict[int, np.ndarray] = {}
        records = []
        for index, image in enumerate(images, start=first or 0):
            with _add_index_to_errors(None if first is None else index):
                pixels[index] = read_pixels(image)
            name = Path(image).name if isinstance(image, str | Path) else ""
            records.append(ImageRecord(index, name, *pixels[index].shape[:2]))
        regions_by_index: dict[int, Regions] = {}
        for batch in group_by_input_size(records, self.recipe.input, BATCH_SIZE):
            try:
                with self._inference():
                    batch_regions = compute([pixels[record.id] for record in batch], batch)
            except torch.cuda.OutOfMemoryError as error:
                raise RuntimeFailure(
                    f"{self.device} has too little memory for {format_count(len(batch), 'image')}; free some of it, "
                    "or pass fewer or smaller images"
                ) from error
            regions_by_index |= {regions.image_id: replace(regions, names=self.classes) for regions in batch_regions}
        return [regions_by_index[record.id] for record in records]


def _make_regions(
    record: ImageRecord, boxes: np.ndarray, category_ids: np.ndarray, image_features: ImageFeatures
) -> Regions:
    """Regions of an image from its given boxes and their features."""
    return Regions(
        record.id,
        record.file_name,
        record.height,
        record.width,
        boxes=boxes,
        scores=np.ones(len(boxes), np.float32),
        category_ids=category_ids,
        masks=image_features.masks,
        features=image_features.features,
        maps=image_features.maps,
        im_info=image_features.im_info,
    )


def _check_one_per_image(argument: str, values: Any, count: int) -> None:
    """Raise ArgumentError unless `values` has one item per image."""
    if not hasattr(values, "__len__") or len(values) != count:
        raise ArgumentError(argument, f"a list of {count} is needed, one for each image")


def _select(values: Any, index: int | None) -> Any:
    """The values of an image of a list, or of the only image."""
    return values if index is None else values[index]


@contextmanager
def _add_index_to_errors(index: int | None) -> Iterator[None]:
    """Context manager that adds the index in the caller's list, if any, to the argument name of an error."""
    try:
        yield
    except ArgumentError as error:
        if index is None:
            raise
        raise ArgumentError(f"{error.argument}[{index}]", error.problem) from None
