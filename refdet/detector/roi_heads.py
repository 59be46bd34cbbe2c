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
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.config.recipe import ModelOptions
from refdet.detector.conv2d import Conv2d
from refdet.detector.mask_predictor import MaskPredictor
from refdet.detector.packed_layers import conv_relu
from refdet.detector.res5_head import SplitRes5
from refdet.detector.roi_chunks import Chunk, roi_chunks
from refdet.detector.roi_outputs import RoiFeatures, RoiOutput
from refdet.ops.pooling import (
    PyramidLevels,
    pyramid_levels,
    pyramid_roi_align,
    pyramid_roi_align_mean,
    roi_align,
    roi_align_mean,
    roi_crop,
    roi_crop_mean,
)

POOL_SIZE = 7  # cells on a side of a RoI
ALIGNED = {"align": True, "align_legacy": False}  # values of model.pooling that are RoIAlign -> its `aligned`
CPU_CHUNK_BYTES = 2**24  # limit of the float32 output of conv5 for a chunk of RoIs, without gradients


class RoiHead(Protocol):
    """Interface of the second stage, implemented by `C4Head`, `StandardHead` and `VGGHead`."""

    mask_size: int

    def precompute(self, maps: Sequence[Tensor], num_rois: int) -> Sequence[Tensor]:
        """Prepare the feature maps for the other methods, once per batch; `num_rois` is the expected number."""

    def levels(self, rois: Tensor) -> PyramidLevels | None:
        """Pyramid levels of rois (K, 5), to share among the other methods, as computing them waits for a GPU."""

    def pool_cells(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Pooled cells (K, C, 7, 7) of rois (K, 5)."""

    def pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Mean (K, C) over the pooled cells of rois (K, 5), in float32."""

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""

    def forward_inference(
        self,
        maps: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor | None,
        spatial: bool,
        levels: PyramidLevels | None = None,
    ) -> RoiOutput:
        """Features of rois (K, 5), and their masks if `labels` (K,), 1..classes, are given.

        The output has spatial features only if `spatial` is set.
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


def pool_cells(x: Tensor, rois: Tensor, model: ModelOptions) -> Tensor:
    """Cells (K, C, m, m) of rois (K, 5) of one feature map x, m = ``model.pooler_resolution``.

    ``model.pooling`` is "align" for RoIAlign with half-pixel alignment; "align_legacy" for RoIAlign without it;
    "crop_and_resize" for the reference's crop; "crop_max" and "crop_align" for its variants that take the maximum of
    2x2 samples per cell.
    """
    cells = model.pooler_resolution
    if model.pooling in ALIGNED:
        return roi_align(x, rois, cells, model.stride, model.sampling_ratio, ALIGNED[model.pooling])
    if model.pooling == "crop_and_resize":
        return roi_crop(x, rois, cells, model.stride)
    return F.max_pool2d(roi_crop(x, rois, 2 * cells, model.stride), 2)


def pool_mean(x: Tensor, rois: Tensor, model: ModelOptions) -> Tensor:
    """Mean (K, C) over the cells of `pool_cells`, in float32."""
    cells = model.pooler_resolution
    if model.pooling in ALIGNED:
        return roi_align_mean(x, rois, cells, model.stride, model.sampling_ratio, ALIGNED[model.pooling])
    if model.pooling == "crop_and_resize":
        return roi_crop_mean(x, rois, cells, model.stride)
    return _mean(pool_cells(x, rois, model))


class C4Head(nn.Module):
    """conv5 on RoIs of the conv4 map; 14x14 masks from its 7x7 output.

    Args:
        conv5: the last stage of a ResNet, with stride ``model.pooler_resolution / 7``, or last layers of a MobileNet.
        out_channels: its output channels, D.
        model: the recipe's options.
        classes: number of object classes, without background.
    """

    mask_size = 2 * POOL_SIZE

    def __init__(self, conv5: nn.Module, out_channels: int, model: ModelOptions, classes: int) -> None:
        super().__init__()
        self.model = model
        self.conv5 = conv5
        self.box = BoxPredictor(out_channels, classes)
        self.mask = MaskPredictor(out_channels, model.mask_channels, classes, convolutions=0) if model.masks else None

    def precompute(self, maps: Sequence[Tensor], num_rois: int) -> Sequence[Tensor]:
        """The feature map, and its projection by conv5's first convolutions if that saves work."""
        (x,) = maps
        positions = x.shape[0] * x.shape[2] * x.shape[3]
        if isinstance(self.conv5, SplitRes5) and num_rois * POOL_SIZE**2 > positions:
            return [x, self.conv5.project(x)]
        return maps

    def levels(self, rois: Tensor) -> PyramidLevels | None:
        """None, as there is one map."""
        return None

    def pool_cells(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Pooled cells (K, C, 7, 7) of rois (K, 5)."""
        return self._pool(maps[0], rois)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""
        return torch.cat([_mean(self._spatial(maps, chunk.take(rois)))[: chunk.count] for chunk in self._chunks(rois)])

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""
        spatial = self._spatial(maps, rois)
        return RoiFeatures(_mean(spatial), spatial)

    def forward_inference(
        self,
        maps: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor | None,
        spatial: bool,
        levels: PyramidLevels | None = None,
    ) -> RoiOutput:
        """Features of rois (K, 5), and their masks if `labels` (K,), 1..classes, are given."""
        parts = []
        for chunk in self._chunks(rois):
            part = chunk.take(rois)
            features = self.features(maps, part)
            logits = None if labels is None else self.mask_logits(maps, part, features, chunk.take(labels))
            parts.append(RoiOutput(features.fc7, features.spatial if spatial else None, logits)[: chunk.count])
        return RoiOutput.cat(parts)

    def _chunks(self, rois: Tensor) -> list[Chunk]:
        max_rois = max(CPU_CHUNK_BYTES // (4 * POOL_SIZE**2 * self.box.score.in_features), 1)
        return roi_chunks(len(rois), rois.device, max_rois)

    def _spatial(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """conv5's output (K, D, 7, 7) of rois (K, 5), from the result of `precompute`."""
        if not isinstance(self.conv5, SplitRes5):
            return self.conv5(self._pool(maps[0], rois))
        is_projected = len(maps) > 1
        return self.conv5(self._pool(maps[1], rois) if is_projected else self.conv5.project(self._pool(maps[0], rois)))

    def pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Mean (K, C) over the pooled cells of rois (K, 5), in float32."""
        return pool_mean(maps[0], rois, self.model)

    def _pool(self, x: Tensor, rois: Tensor) -> Tensor:
        return pool_cells(x, rois, self.model)

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m) of the class `labels` (K,), 1..classes, of each RoI, in float32."""
        if self.mask is None:
            raise ValueError("this detector has no mask branch")
        return self.mask(features.spatial, labels)


class StandardHead(nn.Module):
    """Linear layers on RoIs of 7x7 cells of a pyramid or a single map; 28x28 masks by convolutions on 14x14 cells.

    Args:
        channels: channels of the feature maps, C.
        model: the recipe's options.
        classes: number of object classes, without background.
        strides: strides of the maps to pool from, finest first.
    """

    mask_size = 4 * POOL_SIZE

    def __init__(self, channels: int, model: ModelOptions, classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides, hidden = tuple(strides), model.fpn_hidden
        self.sampling_ratio, self.aligned = model.sampling_ratio, ALIGNED[model.pooling]
        self.convs = nn.ModuleList(Conv2d(channels, channels, 3, padding=1) for _ in range(model.box_convs))
        self.fc6 = nn.Linear(channels * POOL_SIZE**2, hidden)
        self.fc7 = nn.Linear(hidden, hidden) if model.box_fcs == 2 else nn.Identity()
        for layer in (*self.convs, self.fc6, self.fc7):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.box = BoxPredictor(hidden, classes)
        self.mask = MaskPredictor(channels, model.mask_channels, classes, convolutions=4) if model.masks else None

    def precompute(self, maps: Sequence[Tensor], num_rois: int) -> Sequence[Tensor]:
        """The feature maps, unchanged."""
        return maps

    def levels(self, rois: Tensor) -> PyramidLevels | None:
        """Pyramid levels of rois (K, 5)."""
        return pyramid_levels(rois, self.strides)

    def pool_cells(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Pooled cells (K, C, 7, 7) of rois (K, 5), from the four finest maps of the pyramid."""
        return self._pool(maps, rois, POOL_SIZE, levels)

    def _pool(self, maps: Sequence[Tensor], rois: Tensor, size: int, levels: PyramidLevels | None = None) -> Tensor:
        finest = maps[: len(self.strides)]
        return pyramid_roi_align(finest, rois, size, self.strides, self.sampling_ratio, self.aligned, levels)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""
        return self.features(maps, rois).fc7.float()

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""
        return self._features(self.pool_cells(maps, rois))

    def _features(self, pooled: Tensor) -> RoiFeatures:
        hidden = self._apply_convs(pooled) if self.convs else pooled
        return RoiFeatures(F.relu(self.fc7(F.relu(self.fc6(hidden.flatten(1))))), pooled)

    def _apply_convs(self, pooled: Tensor) -> Tensor:
        parts = []
        for chunk in roi_chunks(len(pooled), pooled.device):
            hidden = chunk.take(pooled)
            for convolution in self.convs:
                hidden = conv_relu(convolution, hidden)
            parts.append(hidden[: chunk.count])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def forward_inference(
        self,
        maps: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor | None,
        spatial: bool,
        levels: PyramidLevels | None = None,
    ) -> RoiOutput:
        """Features of rois (K, 5), and their masks if `labels` (K,), 1..classes, are given."""
        levels = levels or self.levels(rois)
        features = self._features(self._pool(maps, rois, POOL_SIZE, levels))
        logits = None
        if labels is not None and self.mask is not None:
            pooled = self._pool(maps, rois, 2 * POOL_SIZE, levels)
            chunks = roi_chunks(len(rois), rois.device)
            logits = torch.cat([self.mask(c.take(pooled), c.take(labels))[: c.count] for c in chunks])
        return RoiOutput(features.fc7.float(), features.spatial if spatial else None, logits)

    def pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Mean (K, C) over the pooled cells of rois (K, 5), in float32."""
        finest = maps[: len(self.strides)]
        return pyramid_roi_align_mean(finest, rois, POOL_SIZE, self.strides, self.sampling_ratio, self.aligned, levels)

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m) of the class `labels` (K,), 1..classes, of each RoI, in float32."""
        if self.mask is None:
            raise ValueError("this detector has no mask branch")
        return self.mask(self._pool(maps, rois, 2 * POOL_SIZE), labels)


def _mean(cells: Tensor) -> Tensor:
    """Mean (K, C) over cells (K, C, m, m), accumulated in float32."""
    return cells.mean((2, 3), dtype=torch.float32 if cells.dtype != torch.float64 else None)
