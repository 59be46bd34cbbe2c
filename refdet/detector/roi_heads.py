"""The second stage: what is in a RoI, where exactly, and which of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.detector.fpn import FeaturePyramid
from refdet.detector.res5_head import SplitRes5
from refdet.ops.pooling import (
    pyramid_roi_align,
    pyramid_roi_align_mean,
    roi_align,
    roi_align_mean,
    roi_crop,
    roi_crop_mean,
)

POOL_SIZE = 7
# RoIs go through conv5 in pieces whose output is about so large, in float32, where no gradient is wanted
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**31}


@dataclass(frozen=True)
class RoiFeatures:
    """Features of K RoIs.

    Attributes:
        fc7: (K, D) what classes and boxes are predicted from.
        spatial: (K, D', 7, 7) what masks are predicted from; of a C4 network fc7 is its mean.
    """

    fc7: Tensor
    spatial: Tensor

    def __getitem__(self, rows: Tensor) -> RoiFeatures:
        return RoiFeatures(self.fc7[rows], self.spatial[rows])


@dataclass(frozen=True)
class RoiOutput:
    """What is asked for of K RoIs.

    Attributes:
        fc7: (K, D) float32; spatial: (K, D', 7, 7), or None; see `RoiFeatures`.
        mask_logits: (K, m, m) float32, or None.
    """

    fc7: Tensor
    spatial: Tensor | None
    mask_logits: Tensor | None

    @classmethod
    def joined(cls, parts: Sequence[RoiOutput]) -> RoiOutput:
        """Of the RoIs of all parts, which were asked for the same."""
        first = parts[0]
        return cls(
            torch.cat([part.fc7 for part in parts]),
            None if first.spatial is None else torch.cat([part.spatial for part in parts if part.spatial is not None]),
            None
            if first.mask_logits is None
            else torch.cat([part.mask_logits for part in parts if part.mask_logits is not None]),
        )


class RoiHead(Protocol):
    """What the detector asks of a head; `C4Head` and `PyramidHead` answer.

    RoIs (K, 5) are rows of image index and the corners to pool at, in pixels of the network's input.
    """

    mask_size: int

    def precompute(self, maps: Sequence[Tensor], rois: int) -> Sequence[Tensor]:
        """What the other methods take as maps; made once for a batch of which about so many RoIs will be asked."""

    def pooled(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """The cells (K, C, 7, 7) of rois (K, 5), read from the maps."""

    def pool5(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """(K, C) mean over the cells of rois (K, 5), in float32."""

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """(K, D) what classes and boxes are predicted from, of rois (K, 5), in float32."""

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""

    def forward_inference(
        self, maps: Sequence[Tensor], rois: Tensor, labels: Tensor | None, spatial: bool
    ) -> RoiOutput:
        """Features of rois (K, 5), and with `labels` (K,), 1..classes, their masks.

        Keeps no more of them in memory at once than is asked for.
        """

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m), in float32, of the class (1..classes) that `labels` (K,) names for each."""


class BoxPredictor(nn.Module):
    """Two linear layers: classes, and deltas for each class."""

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
    """Convolutions, one 2x2 up-sampling, and a 1x1 that has a mask for each class."""

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
        # only the wanted class of each RoI is computed, not all of them
        weight = self.logits.weight[labels, :, 0, 0].to(hidden.dtype)
        bias = self.logits.bias[labels].float()  # type: ignore[index]
        return torch.einsum("kchw,kc->khw", hidden, weight).float() + bias[:, None, None]


class C4Head(nn.Module):
    """conv5 of the ResNet on 7x7 RoIs of the conv4 map; masks of 14x14 from its output.

    Args:
        conv5: the last stage, with stride 1, from the map to `out_channels`.
        pooling: "align" for RoIAlign; "crop" for the reference's crop; "crop_align" for its other variant, which takes
            the largest of 2x2 samples for each cell.
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
        """The map, and where it saves work what conv5's first convolutions make of it; see `RoiHead`."""
        (x,) = maps
        positions = x.shape[0] * x.shape[2] * x.shape[3]
        if isinstance(self.conv5, SplitRes5) and rois * POOL_SIZE**2 > positions:
            return [x, self.conv5.project(x)]
        return maps

    def pooled(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """See `RoiHead`."""
        return self._pool(maps[0], rois)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """See `RoiHead`."""
        return torch.cat([_mean(self._spatial(maps, part)) for part in self._chunks(rois)])

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """See `RoiHead`."""
        spatial = self._spatial(maps, rois)
        return RoiFeatures(_mean(spatial), spatial)

    def forward_inference(
        self, maps: Sequence[Tensor], rois: Tensor, labels: Tensor | None, spatial: bool
    ) -> RoiOutput:
        """See `RoiHead`."""
        parts, first = [], 0
        for part in self._chunks(rois):
            features, rows = self.features(maps, part), slice(first, first + len(part))
            logits = None if labels is None else self.mask_logits(maps, part, features, labels[rows])
            parts.append(RoiOutput(features.fc7, features.spatial if spatial else None, logits))
            first += len(part)
        return RoiOutput.joined(parts)

    def _chunks(self, rois: Tensor) -> Sequence[Tensor]:
        if torch.is_grad_enabled():
            return [rois]
        budget = CHUNK_BYTES.get(rois.device.type, CHUNK_BYTES["cpu"])
        most = max(budget // (4 * POOL_SIZE**2 * self.box.score.in_features), 1)
        return rois.chunk(max(-(-len(rois) // most), 1))  # of one size, or nearly

    def _spatial(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """conv5's output (K, D, 7, 7) of rois (K, 5) from maps that `precompute` gave."""
        if not isinstance(self.conv5, SplitRes5):
            return self.conv5(self._pool(maps[0], rois))
        early = len(maps) > 1
        return self.conv5(self._pool(maps[1], rois) if early else self.conv5.project(self._pool(maps[0], rois)))

    def pool5(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """See `RoiHead`."""
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
        """See `RoiHead`."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """See `RoiHead`."""
        if self.mask is None:
            raise ValueError("this detector has no mask branch")
        return self.mask(features.spatial, labels)


class PyramidHead(nn.Module):
    """Two linear layers on 7x7 RoIs of the pyramid; masks of 28x28 by convolutions on 14x14 RoIs."""

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
        """The maps as they are; see `RoiHead`."""
        return maps

    def pooled(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """From the four finest maps of the pyramid; see `RoiHead`."""
        return pyramid_roi_align(maps[:4], rois, POOL_SIZE, self.strides)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """See `RoiHead`."""
        return self.features(maps, rois).fc7.float()

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """See `RoiHead`."""
        pooled = self.pooled(maps, rois)
        return RoiFeatures(F.relu(self.fc7(F.relu(self.fc6(pooled.flatten(1))))), pooled)

    def forward_inference(
        self, maps: Sequence[Tensor], rois: Tensor, labels: Tensor | None, spatial: bool
    ) -> RoiOutput:
        """See `RoiHead`."""
        features = self.features(maps, rois)
        logits = None if labels is None else self.mask_logits(maps, rois, features, labels)
        return RoiOutput(features.fc7.float(), features.spatial if spatial else None, logits)

    def pool5(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """See `RoiHead`."""
        return pyramid_roi_align_mean(maps[:4], rois, POOL_SIZE, self.strides)

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """See `RoiHead`."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """See `RoiHead`."""
        if self.mask is None:
            raise ValueError("this detector has no mask branch")
        return self.mask(pyramid_roi_align(maps[:4], rois, 2 * POOL_SIZE, self.strides), labels)


def _mean(cells: Tensor) -> Tensor:
    """The mean (K, C) over cells (K, C, m, m), in float32 whatever their type."""
    return cells.mean((2, 3), dtype=torch.float32 if cells.dtype != torch.float64 else None)
