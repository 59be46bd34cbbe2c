"""The region proposal network (Ren et al., "Faster R-CNN", 2015).

Shape shorthand in this module:

    B: images in the batch
    N: anchors of all feature maps
    C: channels of a feature map
    Hi, Wi: height and width of feature map i
    P: proposals of an image
    S: sampled anchors of an image

Boxes are xyxy in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.config.recipe import ModelOptions, ProposalOptions
from refdet.detector.anchors import AnchorGenerator
from refdet.detector.conv2d import Conv2d
from refdet.detector.packed_layers import conv_relu
from refdet.detector.postprocess import batched_nms, top_anchors
from refdet.detector.sampling import subsample_labels
from refdet.detector.target_assignment import IGNORE, anchors_inside, assign_labels
from refdet.structures import boxes as box_ops
from refdet.structures.box_convention import BoxConvention
from refdet.structures.ground_truth import PaddedGroundTruth

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of dx, dy, dw and dh, of the RPN
MIN_SIDE = 1e-3  # pixels; smaller proposals are dropped


@dataclass(frozen=True)
class RpnOutput:
    """RPN predictions for a batch.

    Attributes:
        logits: (B, N) objectness before the sigmoid.
        deltas: (B, N, 4) box deltas.
        anchors: (N, 4), level after level.
        level_sizes: number of anchors of each level.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    level_sizes: tuple[int, ...]


class RegionProposalNetwork(nn.Module):
    """One or more 3x3 convolutions and two 1x1 predictors, shared by all feature maps.

    Args:
        in_channels: channels of the feature maps, C.
        model: the recipe's options of the network.
        anchors: generates the anchors of the feature maps.
        options: the recipe's options of proposals and of the RPN's losses.
        convention: how deltas are decoded and boxes clipped.
    """

    def __init__(
        self,
        in_channels: int,
        model: ModelOptions,
        anchors: AnchorGenerator,
        options: ProposalOptions,
        convention: BoxConvention,
    ) -> None:
        super().__init__()
        self.anchors, self.options = anchors, options
        self.convention, self.legacy_tie_order = convention, model.legacy_tie_order
        channels = model.rpn_channels
        self.conv = Conv2d(in_channels, channels, 3, padding=1)
        more = [Conv2d(channels, channels, 3, padding=1) for _ in range(model.rpn_convs - 1)]
        self.more = nn.ModuleList(more)
        self.score = Conv2d(channels, anchors.anchors_per_cell, 1)
        self.delta = Conv2d(channels, anchors.anchors_per_cell * 4, 1)
        for layer in (self.conv, *more, self.score, self.delta):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> RpnOutput:
        """Feature maps (B, C, Hi, Wi) -> float32 logits and deltas of their anchors."""
        logits, deltas = [], []
        for x in maps:
            hidden = conv_relu(self.conv, x)
            for convolution in self.more:
                hidden = conv_relu(convolution, hidden)
            logits.append(self.score(hidden).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.delta(hidden).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
        sizes = tuple(level.shape[1] for level in logits)
        anchors = torch.cat(self.anchors(maps))
        return RpnOutput(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, sizes)

    @torch.no_grad()
    def filter_proposals(self, output: RpnOutput, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Decode the top-scoring anchors of each level, clip them to the image, and apply NMS within each level.

        Args:
            output: predictions of `forward`.
            sizes: (height, width) of each image in pixels of the network's input, without padding.

        Returns:
            (P, 4) proposals of each image, highest scores first.
        """
        options = self.options
        pre_nms_top_n = options.pre_nms_top_n_train if self.training else options.pre_nms_top_n_test
        post_nms_top_n = options.post_nms_top_n_train if self.training else options.post_nms_top_n_test
        all_boxes, all_scores, start = [], [], 0
        for level_size in output.level_sizes:
            level = slice(start, start + level_size)
            start += level_size
            count = min(pre_nms_top_n, level_size)
            scores, order = top_anchors(output.logits[:, level], count, self.legacy_tie_order)
            deltas = box_ops.gather(output.deltas[:, level], order)
            all_boxes.append(self.convention.decode(deltas, output.anchors[level][order], DELTA_WEIGHTS))
            all_scores.append(scores)
        decoded, scores = torch.cat(all_boxes, dim=1), torch.cat(all_scores, dim=1)
        if len(set(sizes)) == 1:
            boxes = self.convention.clip(decoded, *sizes[0])
        else:
            boxes = torch.stack([self.convention.clip(b, *size) for b, size in zip(decoded, sizes, strict=True)])
        nonempty = ((boxes[..., 2:] - boxes[..., :2]) > MIN_SIDE).all(dim=-1)
        # boxes to drop get image -1: removing them would synchronize with the GPU to read how many are left
        images = torch.arange(len(sizes), device=boxes.device)[:, None].expand_as(nonempty).masked_fill(~nonempty, -1)
        levels = None
        if len(all_scores) > 1:
            level_ids = [torch.full_like(s, i, dtype=torch.int64) for i, s in enumerate(all_scores)]
            levels = torch.cat(level_ids, 1).flatten()
        boxes = boxes.flatten(0, 1)
        keep, counts = batched_nms(
            boxes,
            scores.flatten(),
            levels,
            images.flatten(),
            num_images=len(sizes),
            iou_threshold=options.nms_threshold,
            max_keep=post_nms_top_n,
            legacy_tie_order=self.legacy_tie_order,
        )
        return list(boxes[keep].split(counts))

    def assign_targets(
        self, anchors: Tensor, sizes: Sequence[tuple[int, int]], truth: PaddedGroundTruth
    ) -> tuple[Tensor, Tensor]:
        """`assign_labels` of anchors (N, 4) in images of the given (height, width); with the recipe's `inside_only`.

        Returns:
            labels (B, N) and the index (B, N) of the object that each anchor overlaps most.
        """
        options = self.options
        inside_image = anchors_inside(anchors, sizes) if options.inside_only else None
        # anchors outside become empty boxes, which overlap nothing and so are no object's best match
        candidates = anchors if inside_image is None else anchors * inside_image[:, :, None]
        labels, matched = assign_labels(
            candidates, truth, options.positive_iou, options.negative_iou, allow_low_quality_matches=True
        )
        return labels if inside_image is None else labels.masked_fill(~inside_image, IGNORE), matched

    def compute_losses(
        self, output: RpnOutput, sizes: Sequence[tuple[int, int]], truth: PaddedGroundTruth, seeds: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sums of the binary cross entropy over the sampled anchors and of smooth L1 over the positive ones.

        The caller divides both by the number of sampled anchors. Does not synchronize with the GPU.

        Args:
            output: predictions of `forward`.
            sizes: (height, width) of each image in pixels of the network's input, without padding.
            truth: annotated objects.
            seeds: (B,) int64, from `refdet.detector.sampling.image_seeds`.

        Returns:
            The sums, and the number of sampled anchors, scalar int64.
        """
        options = self.options
        labels, matched = self.assign_targets(output.anchors, sizes, truth)
        samples = subsample_labels(labels, options.batch_size_per_image, options.positive_fraction, seeds)
        objectness_losses = F.binary_cross_entropy_with_logits(
            output.logits.gather(1, samples.index), samples.positive.to(output.logits.dtype), reduction="none"
        )
        # positives come first, so the box losses need only the first `max_positives` samples
        max_positives = min(int(options.batch_size_per_image * options.positive_fraction), samples.index.shape[1])
        index, negative = samples.index[:, :max_positives], ~samples.positive[:, :max_positives, None]
        objects = box_ops.gather(truth.boxes, matched.gather(1, index))
        targets = box_ops.encode(objects.flatten(0, 1), output.anchors[index].flatten(0, 1), DELTA_WEIGHTS)
        deltas = box_ops.gather(output.deltas, index)
        box_losses = F.smooth_l1_loss(
            deltas,
            targets.reshape(deltas.shape).masked_fill(negative, 0),
            beta=options.smooth_l1_beta,
            reduction="none",
        )
        sums = {
            "loss_objectness": objectness_losses.masked_fill(~samples.valid, 0).sum(),
            "loss_rpn_box_reg": box_losses.masked_fill(negative, 0).sum(),
        }
        return sums, samples.valid.sum()
