"""Small detectors and images for tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data.coco import ImageRecord
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.structures.ground_truth import GroundTruth

# residual blocks that start as the identity keep the activations of an untrained network in bounds
SMALL = ["model.width=8", "model.mask_channels=8", "model.rpn_channels=16", "input.min_sizes=[96]", "model.neck=c4",
         "model.zero_init_residual=true", "model.stride=8", "model.anchor_sizes=[16,32,64]"]  # fmt: skip
PYRAMID = ["model.neck=fpn", "model.anchor_sizes=[8,16,32,64,128]", "model.fpn_channels=16", "model.fc_dim=32"]
VARIANTS = {
    "c4": [],
    "c4-bottleneck": ["model.depth=50"],
    "c4-stride16": ["model.stride=16"],
    "fpn": PYRAMID,
    "frozen": ["model.norm=frozen"],
    "seed": ["model.stride=16", "model.depth=50", "model.norm=frozen", "model.stride_in_1x1=true",
             "model.legacy_plus_one=true", "model.pooling=crop_and_resize", "model.legacy_tie_order=true",
             "input.resize=opencv",
             "input.order=bgr"],
    "detectron2-c4": ["model.stride=16", "model.depth=50", "model.stride_in_1x1=true",
                      "model.pooler_resolution=14", "model.sampling_ratio=0", "model.anchor_offset=0",
                      "model.mask_pasting=padded", "input.resize=pillow"],
    "dc5": ["model.neck=dc5", "model.stride=16", "model.depth=50", "model.fc_dim=32"],
    "torchvision-v2": [*PYRAMID, "model.pooling=align_legacy", "model.torchvision_anchors=true",
                       "model.anchor_offset=0", "model.mask_pasting=torchvision", "input.resize=torchvision",
                       "input.size_divisibility=32", "input.min_sizes=[90]", "model.rpn_convs=2", "model.box_convs=2",
                       "model.box_fcs=1"],
    "vgg16": ["model.backbone=vgg16", "model.stride=16", "model.masks=false", "model.pooling=crop_max",
              "model.fc_dim=32"],
    "mobilenet": ["model.backbone=mobilenet_v1", "model.stride=16", "model.pooling=crop_max"],
    "seed-align": ["model.stride=16", "model.pooling=crop_align", "model.legacy_plus_one=true"],
}  # fmt: skip
CATEGORY_IDS = [1, 3, 7, 44]


def small_recipe(*changes: str) -> Recipe:
    return recipes.load("demo").with_changes([*SMALL, *changes])


def small_model(*changes: str) -> MaskRCNN:
    torch.manual_seed(0)
    model = MaskRCNN(small_recipe(*changes), len(CATEGORY_IDS))
    with torch.no_grad():  # scale up the nearly constant outputs of untrained layers
        for layer in (model.rpn.score, model.rpn.delta, model.head.box.score, model.head.box.delta):
            layer.weight.mul_(8)
        if model.head.mask is not None:
            model.head.mask.logits.weight.mul_(100)
    return model.eval()


def some_images(count: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def records_of(images: list[np.ndarray]) -> list[ImageRecord]:
    return [ImageRecord(i, f"{i}.jpg", *image.shape[:2]) for i, image in enumerate(images)]


def square_mask(x1: int, y1: int, x2: int, y2: int) -> dict[str, Any]:
    """The RLE of a filled box in an image of 96x128."""
    mask = np.zeros((96, 128), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    return coco_mask.encode(mask)


def ground_truth(
    boxes: Sequence[Sequence[int]], labels: Sequence[int], crowds: Sequence[Sequence[float]] = ()
) -> GroundTruth:
    """The objects of an image of 96x128, at scale 1, whose masks fill their boxes."""
    return GroundTruth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        [square_mask(*box) for box in boxes],
        torch.tensor(crowds, dtype=torch.float32).reshape(-1, 4),
        (1.0, 1.0),
    )
