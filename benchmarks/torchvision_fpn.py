"""torchvision's side of `benchmarks/train.py` and `learning.py`: its Mask R-CNN, configured by a recipe."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from refdet.config.recipe import Recipe
from refdet.data.training_batches import Batch
from refdet.structures.detection_options import DetectionOptions

FULL_WIDTH = {"width": 64, "fpn_channels": 256, "fc_dim": 1024, "rpn_channels": 256, "mask_channels": 256}
"""Options of `Recipe.model` for the widths that torchvision has by default."""


class NarrowResNet(resnet.ResNet):
    """torchvision's ResNet-18 or 34 with `width` instead of 64 channels in the first stage."""

    def __init__(self, depth: int, width: int, norm: Callable[[int], nn.Module]) -> None:
        blocks = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}[depth]
        super().__init__(resnet.BasicBlock, blocks, norm_layer=norm)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        for stage, count in enumerate(blocks):
            layer = self._make_layer(resnet.BasicBlock, width * 2**stage, count, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", layer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.inplanes = width * 8


def torchvision_fpn(recipe: Recipe, classes: int, detection: DetectionOptions | None = None) -> MaskRCNN:
    """Mask R-CNN of torchvision with the widths, anchors, proposals, sampling and input size of an FPN recipe.

    Args:
        recipe: ``model.norm`` is "frozen" or "batch"; the RPN must have as many channels as the pyramid.
        classes: number of object classes, without background.
        detection: thresholds at test time; torchvision's own if None.
    """
    model, options, proposals, head = recipe.model, recipe.input, recipe.proposals, recipe.head
    frozen = model.norm == "frozen"
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    if model.width == FULL_WIDTH["width"]:
        network = resnet.__dict__[f"resnet{model.depth}"](norm_layer=norm)
    else:
        network = NarrowResNet(model.depth, model.width, norm)
    stages = ["layer4", "layer3", "layer2", "layer1", "conv1"][: 3 if frozen else 5]
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith((*stages, "bn1")))
    channels, hidden = model.fpn_channels, model.fc_dim
    backbone = BackboneWithFPN(
        network,
        {f"layer{stage}": str(stage - 1) for stage in range(1, 5)},
        [network.inplanes // 8 * 2**stage for stage in range(4)],
        channels,
        LastLevelMaxPool(),
    )
    anchors = AnchorGenerator(tuple((int(size),) for size in model.anchor_sizes), (tuple(model.anchor_ratios),) * 5)
    thresholds = {}
    if detection is not None:
        thresholds = {
            "box_score_thresh": detection.score_threshold,
            "box_nms_thresh": detection.nms_threshold,
            "box_detections_per_img": detection.max_regions,
        }
    return MaskRCNN(
        backbone,
        min_size=options.min_sizes[-1],
        max_size=options.max_size,
        image_mean=[value / 255 for value in options.mean],
        image_std=[value / 255 for value in options.std],
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=proposals.pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=proposals.pre_nms_top_n_test,
        rpn_post_nms_top_n_train=proposals.post_nms_top_n_train,
        rpn_post_nms_top_n_test=proposals.post_nms_top_n_test,
        rpn_nms_thresh=proposals.nms_threshold,
        rpn_fg_iou_thresh=proposals.positive_iou,
        rpn_bg_iou_thresh=proposals.negative_iou,
        rpn_batch_size_per_image=proposals.batch_size_per_image,
        rpn_positive_fraction=proposals.positive_fraction,
        box_head=TwoMLPHead(channels * 7 * 7, hidden),
        box_predictor=FastRCNNPredictor(hidden, classes + 1),
        box_fg_iou_thresh=head.positive_iou,
        box_bg_iou_thresh=head.positive_iou,
        box_batch_size_per_image=head.batch_size_per_image,
        box_positive_fraction=head.positive_fraction,
        mask_head=MaskRCNNHeads(channels, (model.mask_channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(model.mask_channels, model.mask_channels, classes + 1),
        **thresholds,
    )


def torchvision_batch(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Inputs of torchvision for a batch: images (3, H, W) in 0..1, and boxes, labels and bitmaps in original pixels.

    Crowds are left out, as in torchvision's reference training.
    """
    images, targets = [], []
    for stored, flipped, truth in zip(
        batch.images.unpack(torch.device("cpu")), batch.flips, batch.targets, strict=True
    ):
        pixels = stored.flip(1) if flipped else stored
        images.append(pixels.permute(2, 0, 1).float() / 255)
        masks = torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in truth.masks or []]))
        boxes = truth.boxes / truth.boxes.new_tensor([*truth.scale, *truth.scale])
        targets.append({"boxes": boxes, "labels": truth.labels, "masks": masks.flip(2) if flipped else masks})
    return images, targets
