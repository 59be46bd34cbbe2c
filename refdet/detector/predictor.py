"""Inference on images: preprocessing, the network, and its outputs in pixels of the original images.

Shape shorthand in this module:

    B: images in the batch
    n: boxes of an image
    H, W: height and width of an image in pixels
    C: channels of a feature map
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refdet.config.recipe import InputOptions
from refdet.data.coco import ImageRecord
from refdet.data.transforms import input_size, network_inputs
from refdet.detector.feature_names import FEATURE_MAP
from refdet.detector.mask_pasting import paste_masks
from refdet.detector.mask_rcnn import DEFAULT_FEATURES, MaskRCNN
from refdet.detector.outputs import BatchFeatures, Detections
from refdet.device import to_device
from refdet.errors import RuntimeFailure
from refdet.structures.box_convention import InputSize
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.regions import Regions


@dataclass(frozen=True)
class ImageFeatures:
    """Features of the given boxes of an image.

    Attributes:
        features: name -> (n, ...) float32, or float16 if that was requested; `refdet.detector.outputs.BatchFeatures`
            lists names and shapes.
        masks: n COCO compressed RLE ``counts``, or None if no classes were given.
        maps: "head" -> (C, H', W') feature map of the same dtype, if requested; H', W' are its height and width.
        im_info: (3,) float32: height and width of the network's input, and input height / image height.
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
    features: Sequence[str] = DEFAULT_FEATURES,
) -> list[Regions]:
    """Detect regions of images of one input size; takes the arguments of `start_detecting`."""
    return start_detecting(model, images, records, category_ids, options, features=features)()


def start_detecting(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    records: Sequence[ImageRecord],
    category_ids: Sequence[int],
    options: DetectionOptions,
    *,
    features: Sequence[str] = DEFAULT_FEATURES,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], list[Regions]]:
    """Start detecting regions of images of one input size.

    Args:
        model: the network, in eval mode.
        images: (H, W, 3) uint8 RGB each.
        records: the record of each image, for its id, file name and size.
        category_ids: COCO ids of the labels 1, 2, ...
        options: thresholds and limits of the detections.
        features: names from `refdet.detector.feature_names`.
        dtype: float32 or float16, of the features and maps; values beyond the range of float16 become infinite.

    Returns:
        A function that waits for the GPU, encodes the masks and returns the regions. It can be called from any
        thread while the GPU computes the next batch.
    """
    sizes, inputs = _prepare_inputs(model, images)
    outputs = model.predict(inputs, sizes, options, features).to_cpu_async(dtype)
    pasting = model.recipe.model.mask_pasting
    wait = _make_wait(inputs.device)

    def finish() -> list[Regions]:
        wait()
        _check_finite(outputs)
        results = zip(outputs, records, sizes, strict=True)
        return [
            _make_regions(image_outputs, record, size, category_ids, pasting) for image_outputs, record, size in results
        ]

    return finish


def describe_boxes(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    *,
    features: Sequence[str] = DEFAULT_FEATURES,
    labels: Sequence[np.ndarray] | None = None,
) -> list[ImageFeatures]:
    """Compute features of boxes, and masks if `labels` are given; takes the arguments of `start_describing`."""
    return start_describing(model, images, boxes, features=features, labels=labels)()


def start_describing(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    *,
    features: Sequence[str] = DEFAULT_FEATURES,
    labels: Sequence[np.ndarray] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], list[ImageFeatures]]:
    """Start computing the features of given boxes of images of one input size.

    Args:
        model: the network, in eval mode.
        images: (H, W, 3) uint8 RGB each.
        boxes: (n, 4) half-open xyxy each, in pixels of the original image.
        features: names from `refdet.detector.feature_names`.
        labels: (n,) each, 1..classes: the class of each mask; None for no masks.
        dtype: float32 or float16, of the features and maps; values beyond the range of float16 become infinite.

    Returns:
        A function that waits for the GPU, encodes the masks and returns the features. It can be called from any
        thread while the GPU computes the next batch.
    """
    sizes, inputs = _prepare_inputs(model, images)
    host_boxes, counts = torch.from_numpy(np.concatenate([_to_float32(b) for b in boxes])), [len(b) for b in boxes]
    classes = None
    if labels is not None:
        all_labels = torch.from_numpy(np.concatenate([np.asarray(n, np.int64) for n in labels]))
        classes = to_device(all_labels, inputs.device).split(counts)
    device_boxes = to_device(host_boxes, inputs.device).split(counts)
    outputs = model.extract_features(inputs, sizes, device_boxes, classes, features).to_cpu_async(dtype)
    pasting = model.recipe.model.mask_pasting
    wait = _make_wait(inputs.device)

    def finish() -> list[ImageFeatures]:
        wait()
        _check_finite(outputs)
        results = zip(outputs, host_boxes.split(counts), sizes, strict=True)
        return [_image_features(image_outputs, box, size, pasting) for image_outputs, box, size in results]

    return finish


def _prepare_inputs(model: MaskRCNN, images: Sequence[np.ndarray]) -> tuple[list[InputSize], Tensor]:
    """Resize and normalize images that have the same input size (H', W').

    Returns:
        The sizes of each image, and the batch (B, 3, H', W') on the model's device.
    """
    options: InputOptions = model.recipe.input
    sizes = [input_size(image.shape[0], image.shape[1], options) for image in images]
    if len({(s.height, s.width) for s in sizes}) > 1:
        raise ValueError(
            f"images: must have one input size, not {sizes}; batch them with "
            "refdet.data.training_batches.group_by_input_size"
        )
    weight = next(model.parameters())
    with model.timed("input"):
        inputs = network_inputs(images, sizes, options, weight.device)
        return sizes, inputs.to(weight.dtype, memory_format=torch.channels_last)


def _to_float32(boxes: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) as float32, also if there are none in an array of another shape."""
    return np.asarray(boxes, np.float32).reshape(-1, 4)


def _make_wait(device: torch.device) -> Callable[[], object]:
    """A function that waits for the work queued on a device so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)  # waiting sleeps instead of occupying a core
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def _check_finite(outputs: BatchFeatures) -> None:
    """Raise RuntimeFailure if outputs contain NaN or inf, which would silently yield no detections."""
    if not outputs.finite:
        raise RuntimeFailure("the network's outputs contain NaN or inf; check the checkpoint's weights")


def _make_regions(
    outputs: Detections, record: ImageRecord, size: InputSize, category_ids: Sequence[int], pasting: str
) -> Regions:
    """Regions of one image; `outputs` is in host memory."""
    image_features = _image_features(outputs, outputs.boxes, size, pasting)
    ids = np.asarray(category_ids, np.int64)
    return Regions(
        record.id,
        record.file_name,
        record.height,
        record.width,
        boxes=outputs.boxes.numpy(),
        scores=outputs.scores.numpy(),
        category_ids=ids[outputs.labels.numpy() - 1],
        masks=image_features.masks,
        features=image_features.features,
        maps=image_features.maps,
        im_info=image_features.im_info,
    )


def _image_features(outputs: BatchFeatures, boxes: Tensor, size: InputSize, pasting: str) -> ImageFeatures:
    """Features of one image; `outputs` is in host memory."""
    masks = None
    if outputs.masks is not None:
        masks = tuple(paste_masks(outputs.masks, boxes, size.image_height, size.image_width, pasting))
    features = {name: values.numpy() for name, values in outputs.features.items()}
    maps = {} if outputs.feature_map is None else {FEATURE_MAP: _to_numpy(outputs.feature_map[0])}
    return ImageFeatures(features, masks, maps, np.array([size.height, size.width, size.scale_y], np.float32))


def _to_numpy(values: Tensor) -> np.ndarray:
    """Convert to a contiguous array, bfloat16 to float32, as NumPy has no bfloat16."""
    array: np.ndarray = (values.float() if values.dtype == torch.bfloat16 else values).contiguous().numpy()
    return array
