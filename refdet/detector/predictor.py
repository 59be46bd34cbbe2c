"""From images to `Regions` and back to original pixels: the detector in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refdet.config.recipe import InputOptions
from refdet.data.coco import ImageRecord
from refdet.data.transforms import input_size, network_inputs
from refdet.detector.feature_names import HEAD
from refdet.detector.mask_rcnn import FEATURES, MaskRCNN
from refdet.detector.outputs import BatchFeatures, Detections
from refdet.device import on_device
from refdet.errors import RuntimeFailure
from refdet.ops.masks import masks_to_rle
from refdet.structures.box_convention import InputSize
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.regions import Regions


@dataclass(frozen=True)
class ImageFeatures:
    """What the network says of n given boxes of an image.

    Attributes:
        features: name -> (n, ...) float32, see `refdet.detector.mask_rcnn.BatchFeatures`.
        masks: n RLE ``counts`` of the image, or None where no classes were given.
        maps: "head" -> (C, H, W) float32 where it was asked for.
        im_info: (3,) float32: height and width of the network's input, and the factor that made its height of the
            image's. That of the width is input width / image width, exactly; with the reference's way to resize both
            are the one factor.
    """

    features: dict[str, np.ndarray]
    masks: tuple[bytes, ...] | None
    maps: dict[str, np.ndarray]
    im_info: np.ndarray


def detect_batch(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    records: Sequence[ImageRecord],
    category_ids: Sequence[int],
    options: DetectionOptions,
    *,
    features: Sequence[str] = FEATURES,
) -> list[Regions]:
    """The detected regions of images whose inputs have one exact size; see `start_detecting`."""
    return start_detecting(model, images, records, category_ids, options, features=features)()


def start_detecting(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    records: Sequence[ImageRecord],
    category_ids: Sequence[int],
    options: DetectionOptions,
    *,
    features: Sequence[str] = FEATURES,
) -> Callable[[], list[Regions]]:
    """Detect regions of images whose inputs have one exact size; what is returned finishes them, in any thread.

    Finishing waits until a GPU has sent its results, and makes the masks; meanwhile the GPU can do the next batch.

    Args:
        images: (H, W, 3) uint8 RGB each.
        records: their records, for ids and names.
        category_ids: COCO id of label 1, 2, ...
        options: which detections are kept.
        features: names, see `refdet.detector.feature_names`.
    """
    sizes, inputs = _inputs(model, images)
    found = model.predict(inputs, sizes, options, features).to_cpu_async()
    wait = _end_of_work(inputs.device, images)

    def finish() -> list[Regions]:
        wait()
        _check_finite(found)
        results = zip(found, records, sizes, strict=True)
        return [_regions(each, record, size, category_ids) for each, record, size in results]

    return finish


def describe_boxes(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    *,
    features: Sequence[str] = FEATURES,
    labels: Sequence[np.ndarray] | None = None,
) -> list[ImageFeatures]:
    """Features, and with `labels` masks, of given boxes of images; see `start_describing`."""
    return start_describing(model, images, boxes, features=features, labels=labels)()


def start_describing(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    *,
    features: Sequence[str] = FEATURES,
    labels: Sequence[np.ndarray] | None = None,
) -> Callable[[], list[ImageFeatures]]:
    """Describe given boxes of images whose inputs have one exact size; what is returned finishes, in any thread.

    Args:
        images: (H, W, 3) uint8 RGB each.
        boxes: (n, 4) half-open xyxy each, in pixels of the original image.
        features: names, see `refdet.detector.feature_names`.
        labels: (n,) each, 1..classes: the class whose mask is wanted.
    """
    sizes, inputs = _inputs(model, images)
    rows, counts = torch.from_numpy(np.concatenate([_rows(b) for b in boxes])), [len(b) for b in boxes]
    classes = None
    if labels is not None:
        of_all = torch.from_numpy(np.concatenate([np.asarray(n, np.int64) for n in labels]))
        classes = on_device(of_all, inputs.device).split(counts)
    on_its = on_device(rows, inputs.device).split(counts)
    described = model.extract_features(inputs, sizes, on_its, classes, features).to_cpu_async()
    wait = _end_of_work(inputs.device, images)

    def finish() -> list[ImageFeatures]:
        wait()
        _check_finite(described)
        results = zip(described, rows.split(counts), sizes, strict=True)
        return [_image_features(each, box, size) for each, box, size in results]

    return finish


def _inputs(model: MaskRCNN, images: Sequence[np.ndarray]) -> tuple[list[InputSize], Tensor]:
    """The input sizes of images, all the same, and their inputs (B, 3, H, W) on the model's device."""
    options: InputOptions = model.recipe.input
    sizes = [input_size(image.shape[0], image.shape[1], options) for image in images]
    if len({(s.height, s.width) for s in sizes}) > 1:
        raise ValueError(
            f"one input size for a batch, not {sizes}; see refdet.data.training_batches.group_by_input_size"
        )
    weight = next(model.parameters())
    with model.timed("input"):
        inputs = network_inputs(images, sizes, options, weight.device)
        return sizes, inputs.to(weight.dtype, memory_format=torch.channels_last)


def _rows(boxes: np.ndarray) -> np.ndarray:
    return np.asarray(boxes, np.float32).reshape(-1, 4)


def _end_of_work(device: torch.device, images: Sequence[np.ndarray]) -> Callable[[], None]:
    """Waits until all is done that a device was given so far; does not block it for what it is given later.

    Args:
        images: are kept until then, as the device may yet have to fetch them.
    """
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    kept = [*images]

    def wait() -> None:
        event.synchronize()
        kept.clear()

    return wait


def _check_finite(found: BatchFeatures) -> None:
    """RuntimeFailure if the network said NaN or inf of a batch: such a box is never found, and never missed."""
    if not found.finite:
        raise RuntimeFailure("the network's outputs contain NaN or inf; check the checkpoint's weights")


def _regions(found: Detections, record: ImageRecord, size: InputSize, category_ids: Sequence[int]) -> Regions:
    """Of one image, in the host's memory."""
    described = _image_features(found, found.boxes, size)
    ids = np.asarray(category_ids, np.int64)
    return Regions(
        record.id, record.file_name, record.height, record.width,
        boxes=found.boxes.numpy(),
        scores=found.scores.numpy(),
        category_ids=ids[found.labels.numpy() - 1],
        masks=described.masks,
        features=described.features,
        maps=described.maps,
        im_info=described.im_info,
    )  # fmt: skip


def _image_features(found: BatchFeatures, boxes: Tensor, size: InputSize) -> ImageFeatures:
    """Of one image, in the host's memory."""
    masks = None
    if found.masks is not None:
        masks = tuple(masks_to_rle(found.masks, boxes, size.image_height, size.image_width))
    features = {name: values.numpy() for name, values in found.features.items()}
    maps = {} if found.head is None else {HEAD: found.head[0].float().contiguous().numpy()}
    return ImageFeatures(features, masks, maps, np.array([size.height, size.width, size.scale_y], np.float32))
