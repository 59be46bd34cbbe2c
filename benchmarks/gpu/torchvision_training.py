"""torchvision's side of the training benchmark, trained as by its reference scripts.

DataLoader workers read JPEGs and rasterize masks; images are resized on the GPU; autocast to bfloat16 and SGD. The
network is that of the recipe: `TorchvisionC4`, or torchvision's `MaskRCNN` with a ResNet-FPN backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision_c4 import TorchvisionC4

from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex
from refdet.detector import loading

Example = tuple[Tensor, dict[str, Tensor]]


class Examples(Dataset):
    """Dataset of images (3, H, W) in 0..1 with boxes, labels and masks."""

    def __init__(self, index: CocoIndex, folder: Path) -> None:
        self.folder, self.index = folder, index
        self.label_of = {id_: label for label, id_ in enumerate(index.categories, start=1)}
        self.records = [record for record in index.images.values() if index.annotations[record.id]]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Example:
        record = self.records[number]
        pixels = np.array(Image.open(self.folder / record.file_name).convert("RGB"))
        objects = self.index.annotations[record.id]
        masks = []
        for each in objects:
            parts = coco_mask.frPyObjects(each.segmentation, record.height, record.width)
            masks.append(coco_mask.decode(parts).any(axis=2))
        target = {
            "boxes": torch.tensor([each.box for each in objects], dtype=torch.float32),
            "labels": torch.tensor([self.label_of[each.category_id] for each in objects]),
            "masks": torch.from_numpy(np.stack(masks).astype(np.uint8)),
        }
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, target


class TorchvisionC4ForTraining(nn.Module):
    """`TorchvisionC4` that returns the losses of a training step."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        ours = loading.load(run).model
        self.parts = TorchvisionC4(ours, score_threshold=0.05, nms_threshold=0.5, max_regions=100)
        options, heads = ours.recipe.head, self.parts.heads
        heads.fg_bg_sampler.batch_size_per_image = options.batch_size_per_image
        heads.fg_bg_sampler.positive_fraction = options.positive_fraction
        for first in (0, 4):  # conv1 and layer1, which are frozen
            self.parts.body[first].requires_grad_(False)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch, scaled = self.parts.transform(images, targets)
        maps = {"0": self.parts.body(batch.tensors)}
        proposals, rpn_losses = self.parts.rpn(batch, maps, scaled)
        return rpn_losses | self.parts.heads(maps, proposals, batch.image_sizes, scaled)[1]


def make_mask_rcnn_fpn(recipe: Recipe, classes: int) -> MaskRCNN:
    """Make a `MaskRCNN` with the depth, anchors and sampling of an FPN recipe and random weights."""
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{recipe.model.depth}", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    for name, norm in backbone.named_modules():
        if name.endswith("bn3" if recipe.model.depth >= 50 else "bn2"):
            norm.weight.fill_(0.2)  # keeps the sum over the residual blocks bounded
    options, head = recipe.proposals, recipe.head
    sizes = tuple((size,) for size in recipe.model.anchor_sizes)
    return MaskRCNN(
        backbone,
        classes + 1,
        min_size=recipe.input.min_sizes,
        max_size=recipe.input.max_size,
        rpn_anchor_generator=AnchorGenerator(sizes, (tuple(recipe.model.anchor_ratios),) * len(sizes)),
        rpn_pre_nms_top_n_train=options.pre_nms_top_n_train,
        rpn_post_nms_top_n_train=options.post_nms_top_n_train,
        rpn_batch_size_per_image=options.batch_size_per_image,
        box_batch_size_per_image=head.batch_size_per_image,
        box_positive_fraction=head.positive_fraction,
    )


def _collate(examples: list[Example]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [image for image, _ in examples], [target for _, target in examples]


def batches(examples: Examples, batch_size: int, workers: int, on_gpu: bool) -> Iterator[Any]:
    """Yield random batches without end."""
    loader = DataLoader(
        examples,
        batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=on_gpu,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def make_train_step(model: nn.Module, device: str, lr: float, autocast: bool) -> Callable[[Any], float]:
    """Make a function that runs a training step on a batch and returns the loss."""
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9, weight_decay=1e-4)
    model.train()

    def train(batch: Any) -> float:
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in batch[1]]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = torch.stack([*model(images, targets).values()]).sum()
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        return loss.item()

    return train
