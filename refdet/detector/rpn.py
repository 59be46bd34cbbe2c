"""The region proposal network (Ren et al., "Faster R-CNN", 2015).

Shape shorthand in this module:

    B: images in the batch
    N: anchors of all feature maps
    C: channels of a feature map
    Hi, Wi: height and width of feature map i
    P: proposals of an image

Boxes are xyxy in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.config.recipe import ModelOptions, ProposalOptions
from refdet.detector.anchors import Anchors
from refdet.detector.postprocess import best_anchors, counts_of, ranked_nms
from refdet.detector.target_assignment import IGNORE, assign_labels, inside, subsample_labels
from refdet.device import on_device
from refdet.structures import boxes as box_ops
from refdet.structures.box_convention import BoxConvention
from refdet.structures.ground_truth import GroundTruth

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
SMOOTH_L1_BETA = 1.0 / 9
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
    """3x3 convolutions, one by default, and two 1x1 predictors, shared by all feature maps."""

    def __init__(
        self,
        in_channels: int,
        model: ModelOptions,
        anchors: Anchors,
        options: ProposalOptions,
        convention: BoxConvention,
    ) -> None:
        super().__init__()
        self.anchors, self.options = anchors, options
        self.convention, self.legacy_tie_order = convention, model.legacy_tie_order
        channels = model.rpn_channels
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        more = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(model.rpn_convs - 1)]
        self.more = nn.ModuleList(more)
        self.score = nn.Conv2d(channels, anchors.per_cell, 1)
        self.delta = nn.Conv2d(channels, anchors.per_cell * 4, 1)
        for layer in (self.conv, *more, self.score, self.delta):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> RpnOutput:
        """Feature maps (B, C, Hi, Wi) -> float32 logits and deltas of their anchors."""
        logits, deltas = [], []
        for x in maps:
            hidden = torch.relu(self.conv(x))
            for convolution in self.more:
                hidden = torch.relu(convolution(hidden))
            logits.append(self.score(hidden).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.delta(hidden).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
        sizes = tuple(level.shape[1] for level in logits)
        anchors = torch.cat(self.anchors(maps))
        return RpnOutput(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, sizes)

    @torch.no_grad()
    def filter_proposals(self, output: RpnOutput, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Decode the top-scoring anchors of each level, clip them, and apply NMS within each level.

        Args:
            output: predictions of `forward`.
            sizes: (height, width) of each image in pixels of the network's input, without padding.

        Returns:
            (P, 4) proposals of each image, best first.
        """
        options, train = self.options, self.training
        candidates = options.pre_nms_top_n_train if train else options.pre_nms_top_n_test
        count = options.post_nms_top_n_train if train else options.post_nms_top_n_test
        boxes_of, scores_of, start = [], [], 0
        for level_size in output.level_sizes:
            level = slice(start, start + level_size)
            start += level_size
            scores, order = best_anchors(output.logits[:, level], min(candidates, level_size), self.legacy_tie_order)
            deltas = output.deltas[:, level].gather(1, order[:, :, None].expand(-1, -1, 4))
            boxes_of.append(self.convention.decode(deltas, output.anchors[level][order], DELTA_WEIGHTS))
            scores_of.append(scores)
        decoded, scores = torch.cat(boxes_of, dim=1), torch.cat(scores_of, dim=1)
        if len(set(sizes)) == 1:
            boxes = self.convention.clip(decoded, *sizes[0])
        else:
            boxes = torch.stack([self.convention.clip(b, *size) for b, size in zip(decoded, sizes, strict=True)])
        solid = ((boxes[..., 2:] - boxes[..., :2]) > MIN_SIDE).all(dim=-1)
        images, places = solid.nonzero().unbind(dim=1)
        ends = on_device(torch.tensor([level.shape[1] for level in scores_of]).cumsum(0), places.device)
        levels = torch.searchsorted(ends, places, right=True)
        boxes, scores = boxes[images, places], scores[images, places]
        kept = ranked_nms(boxes, scores, levels, images, options.nms_threshold, count, self.legacy_tie_order)
        return list(boxes[kept].split(counts_of(images[kept], len(sizes))))

    def assign_targets(self, anchors: Tensor, size: tuple[int, int], target: GroundTruth) -> tuple[Tensor, Tensor]:
        """Label the anchors (N, 4) of an image of (height, width); returns the same as `assign_labels`."""
        options = self.options
        if not options.inside_only:
            return assign_labels(anchors, target, options.positive_iou, options.negative_iou, best_for_each=True)
        rows = inside(anchors, *size).nonzero()[:, 0]
        kinds = torch.full((len(anchors),), IGNORE, dtype=torch.int64, device=anchors.device)
        matched = torch.zeros_like(kinds)
        kinds[rows], matched[rows] = assign_labels(
            anchors[rows], target, options.positive_iou, options.negative_iou, best_for_each=True
        )
        return kinds, matched

    def compute_losses(
        self,
        output: RpnOutput,
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[GroundTruth],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Binary cross entropy over the sampled anchors and smooth L1 over the positive ones.

        Both are summed and divided by the number of sampled anchors.
        """
        options = self.options
        score_loss, box_loss, count = output.logits.sum() * 0, output.deltas.sum() * 0, 0
        for logits, deltas, size, target in zip(output.logits, output.deltas, sizes, targets, strict=True):
            kinds, matched = self.assign_targets(output.anchors, size, target)
            positive, negative = subsample_labels(
                kinds, options.batch_size_per_image, options.positive_fraction, generator
            )
            chosen = torch.cat((positive, negative))
            wanted_scores = torch.zeros_like(logits[chosen])
            wanted_scores[: len(positive)] = 1
            score_loss = score_loss + F.binary_cross_entropy_with_logits(logits[chosen], wanted_scores, reduction="sum")
            if len(positive):
                wanted = box_ops.encode(target.boxes[matched[positive]], output.anchors[positive], DELTA_WEIGHTS)
                box_loss = box_loss + F.smooth_l1_loss(deltas[positive], wanted, beta=SMOOTH_L1_BETA, reduction="sum")
            count += len(chosen)
        return {"loss_objectness": score_loss / max(count, 1), "loss_rpn_box_reg": box_loss / max(count, 1)}
