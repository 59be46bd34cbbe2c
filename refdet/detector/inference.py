"""From images to `Regions` and back to original pixels: the detector in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refdet.data.coco import ImageRecord
from refdet.data.inputs import input_size, network_input
from refdet.detector.mask_rcnn import Detections, MaskRCNN
from refdet.frames import InputSize
from refdet.ops.masks import masks_to_rle
from refdet.recipe import InputOptions
from refdet.regions import Regions

FEATURES = ("pool5", "fc7")


@dataclass(frozen=True)
class DetectOptions:
    """Which detections are kept, and what is written of them."""

    score_threshold: float = 0.05
    nms_threshold: float = 0.3
    max_regions: int = 100
    features: tuple[str, ...] = FEATURES
    at_least_one: bool = False  # lower the threshold by 0.1 until an image has a detection


@dataclass(frozen=True)
class Description:
    """What the network says of n given boxes of an image.

    Attributes:
        features: name -> (n, width) float32.
        masks: n RLE ``counts`` of the image, or None where no classes were given.
    """

    features: dict[str, np.ndarray]
    masks: tuple[bytes, ...] | None


def detect_batch(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    records: Sequence[ImageRecord],
    category_ids: Sequence[int],
    options: DetectOptions,
    bf16: bool = False,
) -> list[Regions]:
    """The detected regions of images whose inputs have one exact size.

    Args:
        images: (H, W, 3) uint8 RGB each.
        records: their records, for ids and names.
        category_ids: COCO id of label 1, 2, ...
        bf16: run the network in bfloat16; what leaves it is float32.
    """
    sizes, inputs = _inputs(model, images)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        found = model.detect(
            inputs, sizes, options.score_threshold, options.nms_threshold, options.max_regions, options.at_least_one
        )
    return [_regions(d, r, category_ids, options) for d, r in zip(found, records, strict=True)]


def describe_boxes(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    features: Sequence[str] = FEATURES,
    labels: Sequence[np.ndarray] | None = None,
    bf16: bool = False,
) -> list[Description]:
    """Features, and with `labels` masks, of given boxes of images whose inputs have one exact size.

    Args:
        images: (H, W, 3) uint8 RGB each.
        boxes: (n, 4) half-open xyxy each, in pixels of the original image.
        features: names, of `FEATURES`.
        labels: (n,) each, 1..classes: the class whose mask is wanted.
    """
    sizes, inputs = _inputs(model, images)
    rows = [torch.as_tensor(b, dtype=torch.float32, device=inputs.device).reshape(-1, 4) for b in boxes]
    classes = None if labels is None else [torch.as_tensor(n, device=inputs.device).long() for n in labels]
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        described = model.describe(inputs, sizes, rows, classes)
    found = []
    for each, box, size in zip(described, rows, sizes, strict=True):
        masks = None
        if each.masks is not None:
            masks = tuple(masks_to_rle(each.masks, box, size.image_height, size.image_width))
        found.append(Description(_named(each.pool5, each.fc7, features), masks))
    return found


def _inputs(model: MaskRCNN, images: Sequence[np.ndarray]) -> tuple[list[InputSize], Tensor]:
    """The input sizes of images, all the same, and their inputs (B, 3, H, W) on the model's device."""
    options: InputOptions = model.recipe.input
    sizes = [input_size(image.shape[0], image.shape[1], options) for image in images]
    if len({(s.height, s.width) for s in sizes}) > 1:
        raise ValueError(f"one input size for a batch, not {sizes}; see refdet.data.batches.exact_batches")
    device = next(model.parameters()).device
    inputs = torch.stack([network_input(i, s, options) for i, s in zip(images, sizes, strict=True)])
    return sizes, inputs.to(device, memory_format=torch.channels_last)


def _regions(found: Detections, record: ImageRecord, category_ids: Sequence[int], options: DetectOptions) -> Regions:
    masks = None
    if found.masks is not None:
        masks = tuple(masks_to_rle(found.masks, found.boxes, record.height, record.width))
    ids = np.asarray(category_ids, np.int64)
    return Regions(
        record.id, record.file_name, record.height, record.width,
        boxes=found.boxes.cpu().numpy(),
        scores=found.scores.cpu().numpy(),
        category_ids=ids[found.labels.cpu().numpy() - 1],
        masks=masks,
        features=_named(found.pool5, found.fc7, options.features),
    )  # fmt: skip


def _named(pool5: Tensor, fc7: Tensor, names: Sequence[str]) -> dict[str, np.ndarray]:
    available = {"pool5": pool5, "fc7": fc7}
    return {name: available[name].cpu().numpy() for name in names}
