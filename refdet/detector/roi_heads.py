"""The second stage: classes, boxes and masks of RoIs.

Shape shorthand in this module:

    K: RoIs of the batch
    C: channels of a feature map
    D: channels of fc7 (D' of the features that masks are predicted from)
    m: side of a mask in cells

RoIs (K, 5) are rows of image index and xyxy corners in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.detector.fpn import FeaturePyramid
from refdet.detector.res5_head import SplitRes5
from refdet.detector.roi_chunks import Chunk, roi_chunks
from refdet.ops.pooling import (
    pyramid_levels,
    pyramid_roi_align,
    pyramid_roi_align_mean,
    roi_align,
    roi_align_mean,
    roi_crop,
    roi_crop_mean,
)

POOL_SIZE = 7
CPU_CHUNK_BYTES = 2**24  # of conv5's float32 output of a chunk, without gradients


@dataclass(frozen=True)
class RoiFeatures:
    """Features of K RoIs.

    Attributes:
        fc7: (K, D) input of the box predictor.
        spatial: (K, D', 7, 7) input of the mask predictor; fc7 is its mean in a C4 network.
    """

    fc7: Tensor
    spatial: Tensor

    def __getitem__(self, rows: Tensor) -> RoiFeatures:
        return RoiFeatures(self.fc7[rows], self.spatial[rows])


@dataclass(frozen=True)
class RoiOutput:
    """Outputs of `RoiHead.forward_inference`.

    Attributes:
        fc7: (K, D) float32.
        spatial: (K, D', 7, 7), or None.
        mask_logits: (K, m, m) float32, or None.
    """

    fc7: Tensor
    spatial: Tensor | None
    mask_logits: Tensor | None

    def __getitem__(self, rows: slice) -> RoiOutput:
        return RoiOutput(
            self.fc7[rows],
            None if self.spatial is None else self.spatial[rows],
            None if self.mask_logits is None else self.mask_logits[rows],
        )

    @classmethod
    def joined(cls, parts: Sequence[RoiOutput]) -> RoiOutput:
        """Concatenate outputs that have the same fields."""
        first = parts[0]
        return cls(
            torch.cat([part.fc7 for part in parts]),
            None if first.spatial is None else torch.cat([part.spatial for part in parts if part.spatial is not None]),
            None
            if first.mask_logits is None
            else torch.cat([part.mask_logits for part in parts if part.mask_logits is not None]),
        )


class RoiHead(Protocol):
    """Interface of the second stage, implemented by `C4Head` and `PyramidHead`."""

    mask_size: int

    def precompute(self, maps: Sequence[Tensor], rois: int) -> Sequence[Tensor]:
        """Prepare the feature maps for the other methods, once per batch; `rois` is about how many follow."""

    def pooled(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pooled cells (K, C, 7, 7) of rois (K, 5)."""

    def pool5(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Mean (K, C) over the pooled cells of rois (K, 5), in float32."""

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""

    def forward_inference(
        self, maps: Sequence[Tensor], rois: Tensor, labels: Tensor | None, spatial: bool
    ) -> RoiOutput:
        """Features of rois (K, 5), and their masks if `labels` (K,), 1..classes, are given.

        Keeps spatial features only if `spatial` is set.
        """

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m) of the class `labels` (K,), 1..classes, of each RoI, in float32."""


class BoxPredictor(nn.Module):
    """Two linear layers: class logits and per-class box deltas."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, classes + 1)
        self.delta = nn.Linear(channels, (classes + 1) * 4)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.normal_(self.delta.weight, std=0.001)
        nn.init.zeros_(self.score.bias)
        nn.init.zeros_(self.delta.bias)

    def forward(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """fc7 (K, D) -> logits (K, classes + 1) and deltas (K, classes + 1, 4), in float32."""
        fc7 = fc7.to(self.score.weight.dtype)
        deltas = self.delta(fc7).float()
        return self.score(fc7).float(), deltas.reshape(len(fc7), deltas.shape[1] // 4, 4)


class MaskPredictor(nn.Module):
    """3x3 convolutions, a 2x2 transposed convolution, and a 1x1 convolution with a mask per class."""

    def __init__(self, in_channels: int, channels: int, classes: int, convolutions: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
            in_channels = channels
        layers += [nn.ConvTranspose2d(in_channels, channels, 2, 2), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.logits = nn.Conv2d(channels, classes + 1, 1)
        for layer in (*self.hidden, self.logits):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.logits.weight, std=0.001)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """X (K, C, s, s), labels (K,) -> logits (K, 2s, 2s), in float32."""
        hidden = self.hidden(x)
        # compute only the mask of each RoI's class
        weight = self.logits.weight[labels, :, 0, 0].to(hidden.dtype)
        bias = self.logits.bias[labels].float()  # type: ignore[index]
        return torch.einsum("kchw,kc->khw", hidden, weight).float() + bias[:, None, None]


class C4Head(nn.Module):
    """conv5 of the ResNet on 7x7 RoIs of the conv4 map; 14x14 masks from its output.

    Args:
        conv5: the last stage, with stride 1.
        out_channels: its output channels, D.
        stride: of the conv4 map, in pixels of the network's input.
        classes: number of object classes, without background.
        mask_channels: hidden channels of the mask predictor.
        masks: whether there is a mask predictor.
        pooling: "align" for RoIAlign; "crop_and_resize" for the reference's crop; "crop_align" for its other variant,
            which takes the maximum of 2x2 samples per cell.
    """

    mask_size = 2 * POOL_SIZE

    def __init__(
        self,
        conv5: nn.Module,
        out_channels: int,
        stride: int,
        classes: int,
        mask_channels: int,
        masks: bool,
        pooling: str = "align",
    ) -> None:
        super().__init__()
        self.stride, self.pooling = stride, pooling
        self.conv5 = conv5
        self.box = BoxPredictor(out_channels, classes)
        self.mask = MaskPredictor(out_channels, mask_channels, classes, convolutions=0) if masks else None

    def precompute(self, maps: Sequence[Tensor], rois: int) -> Sequence[Tensor]:
        """The feature map, and conv5's first convolutions of it if that saves work."""
        (x,) = maps
        positions = x.shape[0] * x.shape[2] * x.shape[3]
        if isinstance(self.conv5, SplitRes5) and rois * POOL_SIZE**2 > positions:
            return [x, self.conv5.project(x)]
        return maps

    def pooled(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pooled cells (K, C, 7, 7) of rois (K, 5)."""
        return self._pool(maps[0], rois)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""
        return torch.cat([_mean(self._spatial(maps, chunk.of(rois)))[: chunk.count] for chunk in self._chunks(rois)])

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""
        spatial = self._spatial(maps, rois)
        return RoiFeatures(_mean(spatial), spatial)

    def forward_inference(
        self, maps: Sequence[Tensor], rois: Tensor, labels: Tensor | None, spatial: bool
    ) -> RoiOutput:
        """Features of rois (K, 5), and their masks if `labels` (K,), 1..classes, are given."""
        parts = []
        for chunk in self._chunks(rois):
            part = chunk.of(rois)
            features = self.features(maps, part)
            logits = None if labels is None else self.mask_logits(maps, part, features, chunk.of(labels))
            parts.append(RoiOutput(features.fc7, features.spatial if spatial else None, logits)[: chunk.count])
        return RoiOutput.joined(parts)

    def _chunks(self, rois: Tensor) -> list[Chunk]:
        most = max(CPU_CHUNK_BYTES // (4 * POOL_SIZE**2 * self.box.score.in_features), 1)
        return roi_chunks(len(rois), rois.device, most)

    def _spatial(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """conv5's output (K, D, 7, 7) of rois (K, 5), from the result of `precompute`."""
        if not isinstance(self.conv5, SplitRes5):
            return self.conv5(self._pool(maps[0], rois))
        early = len(maps) > 1
        return self.conv5(self._pool(maps[1], rois) if early else self.conv5.project(self._pool(maps[0], rois)))

    def pool5(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Mean (K, C) over the pooled cells of rois (K, 5), in float32."""
        if self.pooling == "align":
            return roi_align_mean(maps[0], rois, POOL_SIZE, self.stride)
        if self.pooling == "crop_and_resize":
            return roi_crop_mean(maps[0], rois, POOL_SIZE, self.stride)
        return _mean(self._pool(maps[0], rois))

    def _pool(self, x: Tensor, rois: Tensor) -> Tensor:
        if self.pooling == "align":
            return roi_align(x, rois, POOL_SIZE, self.stride)
        if self.pooling == "crop_and_resize":
            return roi_crop(x, rois, POOL_SIZE, self.stride)
        return F.max_pool2d(roi_crop(x, rois, 2 * POOL_SIZE, self.stride), 2)

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m) of the class `labels` (K,), 1..classes, of each RoI, in float32."""
        if self.mask is None:
            raise ValueError("this detector has no mask branch")
        return self.mask(features.spatial, labels)


class PyramidHead(nn.Module):
    """Two linear layers on 7x7 RoIs of the pyramid; 28x28 masks by convolutions on 14x14 RoIs."""

    mask_size = 4 * POOL_SIZE

    def __init__(self, channels: int, hidden: int, classes: int, mask_channels: int, masks: bool) -> None:
        super().__init__()
        self.strides = FeaturePyramid.strides[:4]
        self.fc6 = nn.Linear(channels * POOL_SIZE**2, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        self.box = BoxPredictor(hidden, classes)
        self.mask = MaskPredictor(channels, mask_channels, classes, convolutions=4) if masks else None

    def precompute(self, maps: Sequence[Tensor], rois: int) -> Sequence[Tensor]:
        """The feature maps, unchanged."""
        return maps

    def pooled(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pooled cells (K, C, 7, 7) of rois (K, 5), from the four finest maps of the pyramid."""
        return pyramid_roi_align(maps[:4], rois, POOL_SIZE, self.strides)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""
        return self.features(maps, rois).fc7.float()

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""
        return self._features(self.pooled(maps, rois))

    def _features(self, pooled: Tensor) -> RoiFeatures:
        return RoiFeatures(F.relu(self.fc7(F.relu(self.fc6(pooled.flatten(1))))), pooled)

    def forward_inference(
        self, maps: Sequence[Tensor], rois: Tensor, labels: Tensor | None, spatial: bool
    ) -> RoiOutput:
        """Features of rois (K, 5), and their masks if `labels` (K,), 1..classes, are given."""
        levels = pyramid_levels(rois, self.strides)  # once, as it waits for the GPU
        features = self._features(pyramid_roi_align(maps[:4], rois, POOL_SIZE, self.strides, levels))
        logits = None
        if labels is not None and self.mask is not None:
            pooled = pyramid_roi_align(maps[:4], rois, 2 * POOL_SIZE, self.strides, levels)
            chunks = roi_chunks(len(rois), rois.device)
            logits = torch.cat([self.mask(c.of(pooled), c.of(labels))[: c.count] for c in chunks])
        return RoiOutput(features.fc7.float(), features.spatial if spatial else None, logits)

    def pool5(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Mean (K, C) over the pooled cells of rois (K, 5), in float32."""
        return pyramid_roi_align_mean(maps[:4], rois, POOL_SIZE, self.strides)

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m) of the class `labels` (K,), 1..classes, of each RoI, in float32."""
        if self.mask is None:
            raise ValueError("this detector has no mask branch")
        return self.mask(pyramid_roi_align(maps[:4], rois, 2 * POOL_SIZE, self.strides), labels)


def _mean(cells: Tensor) -> Tensor:
    """Mean (K, C) over cells (K, C, m, m), accumulated in float32."""
    return cells.mean((2, 3), dtype=torch.float32 if cells.dtype != torch.float64 else None)
