"""The second stage: classes, boxes and masks of RoIs.

Shape shorthand in this module:

    K: RoIs of the batch
    C: channels of a feature map
    D: channels of fc7
    m: height and width of a mask before pasting
    s: bins on a side of a RoI

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
from refdet.detector.packed_layers import conv_relu
from refdet.detector.res5_head import SplitRes5
from refdet.detector.roi_chunks import Chunk, cat_chunks, pad_rows, roi_chunks
from refdet.detector.roi_outputs import RoiFeatures, RoiOutput
from refdet.detector.roi_predictors import BoxPredictor, MaskPredictor
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

POOL_SIZE = 7  # bins on a side of a RoI, as the box head and conv5's output have them
ALIGNED = {"align": True, "align_legacy": False}  # value of model.pooling -> `aligned` of RoIAlign
CPU_CHUNK_BYTES = 2**24  # limit of the output of conv5 (or a VGG's pooling) for a chunk of RoIs, on CPUs in inference


class RoiHead(Protocol):
    """Interface of the second stage, implemented by `C4Head`, `StandardHead` and `VGGHead`.

    Attributes:
        mask_size: height and width of a mask, m.
    """

    mask_size: int

    def precompute(self, maps: Sequence[Tensor], num_rois: int) -> Sequence[Tensor]:
        """Prepare the feature maps for the other methods in inference, once per batch, for about `num_rois` RoIs."""

    def levels(self, rois: Tensor) -> PyramidLevels | None:
        """Pyramid levels of rois (K, 5), to pass to several methods, as computing them synchronizes with the GPU."""

    def spatial_pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Pooled bins (K, C, s, s) of rois (K, 5); s is ``model.pooler_resolution``, or 7 with a `StandardHead`."""

    def pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Mean (K, C) over the pooled bins of rois (K, 5), in float32."""

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

        The output has spatial features only if `spatial` is set; a `VGGHead` returns neither these nor masks.
        """

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m) of the class `labels` (K,), 1..classes, of each RoI, in float32.

        `features` are the features of these RoIs, from which a `C4Head` predicts the masks.
        """


def pool_rois(x: Tensor, rois: Tensor, model: ModelOptions) -> Tensor:
    """Pool bins (K, C, s, s) of rois (K, 5) from a feature map x, with s = ``model.pooler_resolution``.

    ``model.pooling`` is "align" for RoIAlign with half-pixel alignment, "align_legacy" for RoIAlign without it,
    "crop_and_resize" for the reference's crop, and "crop_max" or "crop_align" for the reference's crops with the
    maximum of 2x2 samples per bin.
    """
    size = model.pooler_resolution
    if model.pooling in ALIGNED:
        return roi_align(x, rois, size, model.stride, model.sampling_ratio, ALIGNED[model.pooling])
    if model.pooling == "crop_and_resize":
        return roi_crop(x, rois, size, model.stride)
    return F.max_pool2d(roi_crop(x, rois, 2 * size, model.stride), 2)


def pool_mean(x: Tensor, rois: Tensor, model: ModelOptions) -> Tensor:
    """Mean (K, C) over the bins of `pool_rois`, in float32."""
    size = model.pooler_resolution
    if model.pooling in ALIGNED:
        return roi_align_mean(x, rois, size, model.stride, model.sampling_ratio, ALIGNED[model.pooling])
    if model.pooling == "crop_and_resize":
        return roi_crop_mean(x, rois, size, model.stride)
    return _mean(pool_rois(x, rois, model))


class C4Head(nn.Module):
    """conv5 on RoIs of the conv4 map; 14x14 masks from its 7x7 output.

    Args:
        conv5: last stage of a ResNet, with stride ``model.pooler_resolution / 7``, or last two layers of a MobileNet.
        out_channels: output channels of conv5, D.
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
        """The feature map and, if that is cheaper than per RoI, its projection by conv5's first convolutions."""
        (x,) = maps
        positions = x.shape[0] * x.shape[2] * x.shape[3]
        if isinstance(self.conv5, SplitRes5) and num_rois * POOL_SIZE**2 > positions:
            return [x, self.conv5.project(x)]
        return maps

    def levels(self, rois: Tensor) -> PyramidLevels | None:
        """None, as there is one map."""
        return None

    def spatial_pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Pooled bins (K, C, s, s) of rois (K, 5), with s = ``model.pooler_resolution``."""
        return self._pool(maps[0], rois)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""
        chunks = self._chunks(maps, rois)
        return cat_chunks([_mean(self._spatial(maps, chunk.take(rois)))[: chunk.count] for chunk in chunks])

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
        chunks = self._chunks(maps, rois)
        return RoiOutput.cat([self._forward_chunk(maps, rois, labels, spatial, chunk) for chunk in chunks])

    def _forward_chunk(
        self, maps: Sequence[Tensor], rois: Tensor, labels: Tensor | None, spatial: bool, chunk: Chunk
    ) -> RoiOutput:
        chunk_rois = chunk.take(rois)
        features = self.features(maps, chunk_rois)
        logits = None if labels is None else self.mask_logits(maps, chunk_rois, features, chunk.take(labels))
        return RoiOutput(features.fc7, features.spatial if spatial else None, logits)[: chunk.count]

    def _chunks(self, maps: Sequence[Tensor], rois: Tensor) -> list[Chunk]:
        """Chunks of rois (K, 5) to run conv5 and the mask predictor on."""
        # values per RoI of the largest activations
        pooled = self.model.pooler_resolution**2 * maps[-1].shape[1]
        conv5_output = POOL_SIZE**2 * self.box.score.in_features
        mask = 0 if self.mask is None else self.mask_size**2 * self.mask.logits.in_channels
        max_rois = max(CPU_CHUNK_BYTES // (4 * conv5_output), 1)  # 4 bytes per float32
        roi_bytes = max(pooled, conv5_output, mask) * maps[0].element_size()
        return roi_chunks(len(rois), rois.device, roi_bytes, max_rois)

    def _spatial(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """conv5's output (K, D, 7, 7) of rois (K, 5), from the result of `precompute`."""
        if not isinstance(self.conv5, SplitRes5):
            return self.conv5(self._pool(maps[0], rois))
        is_projected = len(maps) > 1
        x = self._pool(maps[1], rois) if is_projected else self.conv5.project(self._pool(maps[0], rois))
        for block in self.conv5.blocks():
            x = block(x)
        return x

    def pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Mean (K, C) over the pooled bins of rois (K, 5), in float32."""
        return pool_mean(maps[0], rois, self.model)

    def _pool(self, x: Tensor, rois: Tensor) -> Tensor:
        return pool_rois(x, rois, self.model)

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Mask logits (K, m, m) of the class `labels` (K,), 1..classes, of each RoI, in float32."""
        if self.mask is None:
            raise ValueError("this detector has no mask branch")
        return self.mask(features.spatial, labels)


class StandardHead(nn.Module):
    """Linear layers on 7x7 bins pooled from a pyramid or a single map; 28x28 masks by convolutions on 14x14 bins.

    Args:
        channels: channels of the feature maps, C.
        model: the recipe's options.
        classes: number of object classes, without background.
        strides: strides of the maps to pool from, finest first.
    """

    mask_size = 4 * POOL_SIZE

    def __init__(self, channels: int, model: ModelOptions, classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides, hidden = tuple(strides), model.fc_dim
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

    def levels(self, rois: Tensor) -> PyramidLevels:
        """Pyramid levels of rois (K, 5)."""
        return pyramid_levels(rois, self.strides)

    def spatial_pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Pooled bins (K, C, 7, 7) of rois (K, 5), from the four finest maps of the pyramid."""
        return self._pool(maps, rois, POOL_SIZE, levels)

    def _pool(self, maps: Sequence[Tensor], rois: Tensor, size: int, levels: PyramidLevels | None = None) -> Tensor:
        finest = maps[: len(self.strides)]
        return pyramid_roi_align(finest, rois, size, self.strides, self.sampling_ratio, self.aligned, levels)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""
        return self.features(maps, rois).fc7.float()

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""
        return self._features(maps, rois, None)

    def _features(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None) -> RoiFeatures:
        """`features` of RoIs whose `levels` may be known."""
        if not self.convs:
            hidden = pooled = self._pool(maps, rois, POOL_SIZE, levels)
        else:
            chunks = self._chunks(maps, rois, POOL_SIZE**2 * maps[0].shape[1])
            pooled = self._pool_padded(maps, rois, POOL_SIZE, levels, chunks)
            hidden = cat_chunks([self._apply_convs(chunk.take(pooled))[: chunk.count] for chunk in chunks])
        return RoiFeatures(F.relu(self.fc7(F.relu(self.fc6(hidden.flatten(1))))), pooled[: len(rois)])

    def _apply_convs(self, hidden: Tensor) -> Tensor:
        for convolution in self.convs:
            hidden = conv_relu(convolution, hidden)
        return hidden

    def _chunks(self, maps: Sequence[Tensor], rois: Tensor, values: int) -> list[Chunk]:
        """Chunks of rois (K, 5) whose largest activation has `values` values per RoI."""
        return roi_chunks(len(rois), rois.device, values * maps[0].element_size())

    def _pool_padded(
        self, maps: Sequence[Tensor], rois: Tensor, size: int, levels: PyramidLevels | None, chunks: Sequence[Chunk]
    ) -> Tensor:
        """Pool rois (K, 5), padded to the size of the chunks, as padding the RoIs is cheaper than padding the bins."""
        padded = chunks[-1].first + chunks[-1].size
        if padded > len(rois):
            levels = (levels or self.levels(rois)).pad(padded)
            rois = pad_rows(rois, padded)
        return self._pool(maps, rois, size, levels)

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
        features = self._features(maps, rois, levels)
        logits = None
        if labels is not None and self.mask is not None:
            chunks = self._chunks(maps, rois, self.mask_size**2 * self.mask.logits.in_channels)
            pooled = self._pool_padded(maps, rois, 2 * POOL_SIZE, levels, chunks)
            logits = cat_chunks([self.mask(c.take(pooled), c.take(labels))[: c.count] for c in chunks])
        return RoiOutput(features.fc7.float(), features.spatial if spatial else None, logits)

    def pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Mean (K, C) over the pooled bins of rois (K, 5), in float32."""
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


def _mean(bins: Tensor) -> Tensor:
    """Mean (K, C) over bins (K, C, s, s), in float32; in float64 for float64."""
    return bins.mean((2, 3), dtype=torch.float32 if bins.dtype != torch.float64 else None)
