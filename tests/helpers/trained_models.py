"""Small detectors with random weights and norms as after training, and images for them."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from refdet.config import recipe as recipes
from refdet.data.coco import ImageRecord
from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.resnet import FrozenBatchNorm
from refdet.structures.provenance import Provenance

SMALL = ["model.width=8", "model.mask_channels=8", "model.rpn_channels=16", "input.min_sizes=[96]",
         "model.anchor_sizes=[16,32,64]", "model.depth=50", "model.neck=c4", "model.stride=16"]  # fmt: skip
PYRAMID = ["model.neck=fpn", "model.anchor_sizes=[8,16,32,64,128]", "model.fpn_channels=16", "model.fc_dim=32"]
CROP = ["model.stride_in_1x1=true", "model.legacy_plus_one=true", "model.legacy_tie_order=true", "input.resize=opencv"]
# name -> recipe changes, and whether `SplitRes5` computes conv5 in inference
VARIANTS: dict[str, tuple[list[str], bool]] = {
    "c4": ([], True),
    "frozen": (["model.norm=frozen"], True),
    "stride8": (["model.stride=8"], True),
    "basic-blocks": (["model.depth=18"], False),
    "crop": (["model.norm=frozen", "model.pooling=crop_and_resize", *CROP], True),
    "crop-align": (["model.norm=frozen", "model.pooling=crop_align", *CROP], False),
    "fpn": (PYRAMID, False),
    "vgg16": (["model.backbone=vgg16", "model.masks=false", "model.pooling=crop_max", "model.fc_dim=32"], False),
    "mobilenet": (["model.backbone=mobilenet_v1", "model.pooling=crop_max", "model.width=16"], False),
}
IDS = [1, 3, 7, 44]
NAMES = {1: "person", 3: "car", 7: "train", 44: "bottle"}


def trained_model(*changes: str) -> MaskRCNN:
    """A small detector with random weights, and norms with random statistics as after training."""
    torch.manual_seed(0)
    model = MaskRCNN(recipes.load("demo").with_changes([*SMALL, *changes]), len(IDS))
    with torch.no_grad():
        for name, norm in model.named_modules():
            if isinstance(norm, (FrozenBatchNorm, nn.BatchNorm2d)):
                # the last norms of residual blocks scale less, so that activations do not grow from block to block
                last = name.endswith(("bn3", "downsample.1"))
                norm.weight.uniform_(*((0.2, 0.4) if last else (0.8, 1.2)))
                norm.bias.uniform_(-0.2, 0.2)
                norm.running_mean.uniform_(-0.3, 0.3)
                norm.running_var.uniform_(0.5, 2)
        for layer in (model.rpn.score, model.rpn.delta, model.head.box.score, model.head.box.delta):
            layer.weight.mul_(8)  # so that scores and boxes differ clearly from region to region
    return model.eval()


def saved_model(folder: Path, *changes: str) -> Path:
    """Write the run directory of a `trained_model`."""
    model = trained_model(*changes)
    provenance = Provenance("split.json", "", images=12, annotations=40, image_ids_sha256="ab" * 32)
    folder.mkdir(parents=True)
    checkpoint.save(
        folder, model, checkpoint.CheckpointMetadata(model.recipe, tuple(NAMES.items()), provenance, step=5)
    )
    return folder


def some_images() -> tuple[list[np.ndarray], list[ImageRecord]]:
    """Two images of noise and their records."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(2)]
    return images, [ImageRecord(i, f"{i}.jpg", 96, 128) for i in range(2)]
