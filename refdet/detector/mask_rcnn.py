"""Mask R-CNN (He et al., 2017): backbone, region proposals, second stage.

Shape shorthand in this module:

    B: images in the batch, padded to height H and width W
    P, K, N: proposals, RoIs and boxes (detections or given boxes) of all images together
    n: boxes of one image
    C, Hi, Wi: channels, height and width of feature map i

Proposals and RoIs are in pixels of the network's input; detections and given boxes in pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.config.recipe import Recipe
from refdet.detector.anchors import AnchorGenerator
from refdet.detector.backbone import build_backbone
from refdet.detector.feature_names import FEATURE_MAP
from refdet.detector.finite import all_finite, features_to_check
from refdet.detector.fpn import FeaturePyramid
from refdet.detector.loss_counts import LossCounts, ReduceCounts, no_reduction
from refdet.detector.outputs import BatchFeatures, Detections
from refdet.detector.postprocess import lower_thresholds, select_detections
from refdet.detector.profiler import Profiler
from refdet.detector.resnet import FrozenBatchNorm, Norm
from refdet.detector.roi_heads import C4Head, RoiHead, StandardHead
from refdet.detector.roi_outputs import RoiFeatures
from refdet.detector.roi_sampling import PositiveRois, SampledRois, sample_rois
from refdet.detector.rois import image_indices, image_scales, to_rois
from refdet.detector.rpn import RegionProposalNetwork
from refdet.detector.sampling import image_seeds
from refdet.detector.target_assignment import compute_mask_targets
from refdet.detector.vgg import VGGHead
from refdet.device import to_device
from refdet.structures import boxes as box_ops
from refdet.structures.box_convention import BoxConvention, InputSize
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # factors of dx, dy, dw and dh in the second stage
DEFAULT_FEATURES = ("pool5", "fc7")
NEEDS_BOX_HEAD = frozenset({"fc7", "spatial_fc7", "class_prob"})  # other features need only the feature maps

Sizes = Sequence[tuple[int, int]]  # (height, width) of each image, without padding


@dataclass(frozen=True)
class _SampledBatch:
    """Intermediate results from which the losses of a batch are computed."""

    maps: list[Tensor]  # feature maps (B, C, Hi, Wi)
    rpn_sums: dict[str, Tensor]  # sum of each loss term of the RPN
    sampled: SampledRois
    mask_rois: PositiveRois  # positive RoIs whose object has a mask
    counts: LossCounts


class MaskRCNN(nn.Module):
    """Mask R-CNN: `compute_losses` in training; `predict` and `extract_features` in eval mode.

    Args:
        recipe: architecture; ``recipe.model.norm`` must be frozen or batch, no longer auto.
        classes: number of object classes, without background.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        model = recipe.model
        self.recipe, self.classes = recipe, classes
        self.profiler: Profiler | None = None  # set by a caller that times `predict` and `extract_features`
        self.convention = BoxConvention(model.legacy_plus_one)
        norm: Norm = FrozenBatchNorm if model.norm == "frozen" else nn.BatchNorm2d
        pyramid, dilated = model.neck == "fpn", model.neck == "dc5"
        self.backbone = build_backbone(model, norm)
        channels = self.backbone.channels  # of the stages: conv2 to conv5 of a ResNet
        if pyramid:
            self.neck: FeaturePyramid | None = FeaturePyramid(channels, model.fpn_channels)
            levels: list[tuple[float, ...]] = [(size,) for size in model.anchor_sizes]
            map_strides: tuple[int, ...] = FeaturePyramid.strides
            map_channels = model.fpn_channels
        else:
            self.neck = None
            levels, map_strides, map_channels = [model.anchor_sizes], (model.stride,), channels[3 if dilated else 2]
        rounded, offset = model.legacy_rounded_anchors, model.anchor_offset
        anchors = AnchorGenerator(levels, model.anchor_ratios, map_strides, rounded, offset, model.torchvision_anchors)
        self.rpn = RegionProposalNetwork(map_channels, model, anchors, recipe.proposals, self.convention)
        self.head: RoiHead
        if model.neck != "c4":
            self.head = StandardHead(map_channels, model, classes, map_strides[:4])  # ignores a fifth map
        elif model.backbone == "vgg16":
            self.head = VGGHead(map_channels, model, classes)
        else:
            conv5 = self.backbone.get_submodule("layer4")  # moves to the head, which applies it to RoIs
            delattr(self.backbone, "layer4")
            self.head = C4Head(conv5, channels[3], model, classes)
        if model.norm == "frozen":  # freeze the first layers too, as detectron2 does with FREEZE_AT=2
            for part in self.backbone.frozen_layers():
                part.requires_grad_(False)

    def extract_feature_maps(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> maps (B, C, Hi, Wi): the one of c4 or dc5, or the five of the pyramid."""
        if self.neck is None:
            return [self.backbone(images, 4 if self.recipe.model.neck == "dc5" else 3)[-1]]
        return self.neck(self.backbone(images, 4))

    def compute_losses(
        self,
        images: Tensor,
        sizes: Sizes,
        targets: Sequence[GroundTruth],
        generator: torch.Generator | None = None,
        reduce_counts: ReduceCounts = no_reduction,
    ) -> dict[str, Tensor]:
        """The five terms of the loss (four without masks): scalars, named as in torchvision, whose sum is the loss.

        The number of GPU synchronizations does not depend on the batch size.

        Args:
            images: (B, 3, H, W), normalized and zero-padded at the bottom and right.
            sizes: (height, width) of each image in pixels of the network's input, without padding.
            targets: annotated objects of each image, on the CPU.
            generator: source of two seeds per image, for sampling anchors and RoIs; None for PyTorch's global one. A
                generator on the CPU gives the same samples on every device.
            reduce_counts: sums the counts that the terms are divided by over all batches of a training step.
        """
        batch = self._sample(images, sizes, targets, generator)
        maps, rois, labels = batch.maps, batch.sampled.rois, batch.sampled.labels
        count = reduce_counts(batch.counts).at_least_one()
        losses = {name: term / count.anchors for name, term in batch.rpn_sums.items()}
        pooling_rois = self._pooling_rois(rois, maps, images)
        features = self.head.features(maps, pooling_rois)
        logits, deltas = self.head.predict_boxes(features.fc7)
        losses["loss_classifier"] = F.cross_entropy(logits, labels, reduction="sum") / count.rois
        positive = to_device(batch.sampled.positive.row, images.device)
        box_targets = box_ops.encode(batch.sampled.matched_boxes[positive], rois[positive, 1:], DELTA_WEIGHTS)
        beta = self.recipe.head.smooth_l1_beta
        losses["loss_box_reg"] = (
            F.smooth_l1_loss(deltas[positive, labels[positive]], box_targets, beta=beta, reduction="sum") / count.rois
        )
        if self.recipe.model.masks:
            losses["loss_mask"] = self._mask_loss(pooling_rois, features, batch, targets) / count.mask_pixels
        return losses

    def count_samples(
        self, images: Tensor, sizes: Sizes, targets: Sequence[GroundTruth], generator: torch.Generator | None = None
    ) -> LossCounts:
        """The counts by which `compute_losses` divides for the same arguments; does not compute the second stage."""
        return self._sample(images, sizes, targets, generator).counts

    def _sample(
        self, images: Tensor, sizes: Sizes, targets: Sequence[GroundTruth], generator: torch.Generator | None
    ) -> _SampledBatch:
        """Compute the first stage (the RPN) and its losses, and sample the RoIs of the second stage."""
        truth = PaddedGroundTruth.pad(targets, images.device)
        anchor_seeds, roi_seeds = to_device(image_seeds(len(targets), 2, generator), images.device)
        maps = self.extract_feature_maps(images)
        output = self.rpn(maps)
        sums, anchors = self.rpn.compute_losses(output, sizes, truth, anchor_seeds)
        proposals = self.rpn.filter_proposals(output, sizes)
        sampled = sample_rois(proposals, truth, self.recipe.head, roi_seeds)
        mask_rois = sampled.positive.select_with_mask([target.masks for target in targets])
        pixels = len(mask_rois.row) * self.head.mask_size**2 if self.recipe.model.masks else 0
        return _SampledBatch(maps, sums, sampled, mask_rois, LossCounts(anchors, len(sampled.labels), pixels))

    def _mask_loss(
        self, pooling_rois: Tensor, features: RoiFeatures, batch: _SampledBatch, targets: Sequence[GroundTruth]
    ) -> Tensor:
        """Binary cross entropy, summed over the pixels of the mask of each positive RoI's own class."""
        positive, size = batch.mask_rois, self.head.mask_size
        rows = to_device(positive.row, pooling_rois.device)
        logits = self.head.mask_logits(batch.maps, pooling_rois[rows], features[rows], batch.sampled.labels[rows])
        # computed on the CPU while the GPU computes the logits
        image_targets = [
            compute_mask_targets(boxes, objects, target, size, self.convention)
            for (boxes, objects), target in zip(positive.split_by_image(len(targets)), targets, strict=True)
        ]
        mask_targets = to_device(torch.cat(image_targets), logits.device)
        return F.binary_cross_entropy_with_logits(logits, mask_targets, reduction="sum")

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        sizes: Sequence[InputSize],
        options: DetectionOptions,
        features: Sequence[str] = DEFAULT_FEATURES,
    ) -> Detections:
        """Detect objects. The number of GPU synchronizations does not depend on the batch size.

        Args:
            images: (B, 3, H, W), normalized and zero-padded at the bottom and right.
            sizes: input and original size of each image.
            options: thresholds and limits of the detections.
            features: names of the features of `BatchFeatures` to compute. ``head``, as the reference calls it, is the
                feature map that RoIs are pooled from.

        Returns:
            The detections of all images, with their features and masks.
        """
        with self.timed("backbone"):
            maps: Sequence[Tensor] = self.extract_feature_maps(images)
        with self.timed("proposals"):
            rpn_output = self.rpn(maps)
            proposals = self.rpn.filter_proposals(rpn_output, [(size.height, size.width) for size in sizes])
        boxes, image_index = torch.cat(proposals), image_indices([len(p) for p in proposals], images.device)
        with self.timed("classes and boxes"):
            maps = self.head.precompute(maps, len(boxes))
            rois = self._pooling_rois(to_rois(image_index, boxes), maps, images)
            logits, deltas = self.head.predict_boxes(self.head.box_features(maps, rois))
        with self.timed("postprocessing"):
            finite = all_finite(rpn_output.logits, rpn_output.deltas, logits, deltas)
            boxes, scores, labels, counts = self._select_detections(boxes, image_index, logits, deltas, sizes, options)
        mask_labels = labels if self.recipe.model.masks else None
        outputs = self._extract_features(maps, images, sizes, boxes, counts, mask_labels, features)
        finite = finite & outputs.finite
        return Detections(
            outputs.counts, outputs.features, outputs.masks, outputs.feature_map, finite, boxes, scores, labels
        )

    def _select_detections(
        self,
        proposals: Tensor,
        image_index: Tensor,
        logits: Tensor,
        deltas: Tensor,
        sizes: Sequence[InputSize],
        options: DetectionOptions,
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Select detections from proposals (P, 4), logits (P, classes + 1) and deltas (P, classes + 1, 4).

        Returns:
            boxes (N, 4) in pixels of the original image, scores (N,), labels (N,) and the number of detections of each
            image.
        """
        scores = logits.softmax(dim=1)[:, 1:]
        scales, limits = image_scales(sizes, proposals)
        unscaled = self.convention.unscale(proposals, scales[image_index])
        decoded = self.convention.decode(deltas[:, 1:], unscaled[:, None], DELTA_WEIGHTS)
        boxes = box_ops.clip_to_images(decoded, limits[image_index][:, None])
        if options.lower_threshold_if_empty:
            thresholds = lower_thresholds(boxes, scores, image_index, len(sizes), options.score_threshold)
        else:
            thresholds = scores.new_full((len(sizes),), options.score_threshold)
        legacy_tie_order = self.recipe.model.legacy_tie_order
        return select_detections(
            boxes, scores, image_index, thresholds, options.nms_threshold, options.max_regions, legacy_tie_order
        )

    @torch.no_grad()
    def extract_features(
        self,
        images: Tensor,
        sizes: Sequence[InputSize],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        features: Sequence[str] = DEFAULT_FEATURES,
    ) -> BatchFeatures:
        """Features of given boxes, and their masks if `labels` are given; skips the box head if nothing needs it.

        Args:
            images: (B, 3, H, W), normalized.
            sizes: input and original size of each image.
            boxes: (n, 4) of each image, half-open xyxy in pixels of the original image.
            labels: (n,) of each image, 1..classes: the class of each mask; None for no masks.
            features: names of the features to compute, as in `predict`.
        """
        with self.timed("backbone"):
            maps: Sequence[Tensor] = self.extract_feature_maps(images)
        counts = [len(b) for b in boxes]
        if labels is not None or not NEEDS_BOX_HEAD.isdisjoint(features):
            maps = self.head.precompute(maps, sum(counts))
        mask_labels = None if labels is None else torch.cat(list(labels))
        return self._extract_features(maps, images, sizes, torch.cat(list(boxes)), counts, mask_labels, features)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Context manager that times a part with `profiler`, if set."""
        return nullcontext() if self.profiler is None else self.profiler(part)

    def _extract_features(
        self,
        maps: Sequence[Tensor],
        images: Tensor,
        sizes: Sequence[InputSize],
        boxes: Tensor,
        counts: Sequence[int],
        labels: Tensor | None,
        names: Sequence[str],
    ) -> BatchFeatures:
        """`extract_features` of all boxes (N, 4) and labels (N,), from maps that may be of `RoiHead.precompute`."""
        with self.timed("features and masks"):
            image_index = image_indices(counts, images.device)
            scaled = self.convention.scale(boxes, image_scales(sizes, boxes)[0][image_index])
            rois = self._pooling_rois(to_rois(image_index, scaled), maps, images)
            values: dict[str, Tensor] = {}
            masks = None
            levels = self.head.levels(rois)
            if "pool5" in names:
                values["pool5"] = self.head.pool5(maps, rois, levels)
            if "spatial_pool5" in names:
                values["spatial_pool5"] = self.head.spatial_pool5(maps, rois, levels)
            if labels is not None or not NEEDS_BOX_HEAD.isdisjoint(names):
                outputs = self.head.forward_inference(maps, rois, labels, spatial="spatial_fc7" in names, levels=levels)
                values["fc7"] = outputs.fc7
                if outputs.spatial is not None:
                    values["spatial_fc7"] = outputs.spatial
                if "class_prob" in names:
                    values["class_prob"] = self.head.predict_boxes(outputs.fc7)[0].softmax(dim=1)
                if outputs.mask_logits is not None:
                    masks = outputs.mask_logits.sigmoid()
            feature_map = maps[0] if FEATURE_MAP in names else None
            finite = all_finite(rois, *features_to_check(values), masks, feature_map)
        features = {name: values[name].float() for name in names if name != FEATURE_MAP}
        return BatchFeatures(counts, features, masks, feature_map, finite)

    def _pooling_rois(self, rois: Tensor, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        """RoIs (K, 5) with corners as the recipe's pooling takes them, from half-open rois (K, 5)."""
        corners = self.convention.pooling_corners(rois[:, 1:])
        if self.recipe.model.pooling == "crop_align":
            # lichengunc/mask-faster-rcnn maps the image's first and last pixel to the map's; pooling divides by stride
            scale_y, scale_x = (
                (positions - 1) / max(pixels - 1, 1) * self.recipe.model.stride
                for positions, pixels in zip(maps[0].shape[-2:], images.shape[-2:], strict=True)
            )
            corners = corners * box_ops.new_tensor([scale_x, scale_y, scale_x, scale_y], corners)
        return torch.cat((rois[:, :1], corners), dim=1)
