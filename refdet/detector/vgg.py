"""VGG-16 (Simonyan and Zisserman, 2014) as in the reference: convolutions on images, linear layers on RoIs.

Shape shorthand in this module:

    B: images in the batch, of height H and width W
    K: RoIs of the batch
    C: channels of the feature map
    D: channels of fc7
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from refdet.config.recipe import ModelOptions
from refdet.detector.backbone_channels import vgg_channels
from refdet.detector.packed_layers import conv_relu
from refdet.detector.roi_chunks import cat_chunks, roi_chunks
from refdet.detector.roi_heads import CPU_CHUNK_BYTES, POOL_SIZE, pool_mean, pool_rois
from refdet.detector.roi_outputs import RoiFeatures, RoiOutput
from refdet.detector.roi_predictors import BoxPredictor
from refdet.ops.pooling import PyramidLevels

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # of each stage: channels / width, number of convolutions
DROPOUT = 0.5


class VGG16(nn.Module):
    """The 13 convolutions of VGG-16, without the last max pooling.

    Args:
        width: channels of the first layer, 64 in the paper.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = vgg_channels(width)
        self.convs = nn.ModuleList()
        in_channels = 3
        for factor, count in STAGES:
            for _ in range(count):
                self.convs.append(nn.Conv2d(in_channels, factor * width, 3, padding=1))
                in_channels = factor * width
        for convolution in self.convs:
            assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)

    def frozen_layers(self) -> list[nn.Module]:
        """Layers that are not trained in recipes with frozen norms: the first two stages."""
        return list(self.convs[: STAGES[0][1] + STAGES[1][1]])

    def forward(self, images: Tensor, stages: int) -> list[Tensor]:
        """The first `stages` of the feature maps of strides 4, 8 and 16.

        Args:
            images: (B, 3, H, W), normalized.
            stages: number of maps, 1 to 3.

        Returns:
            Feature maps (B, channels[i], H / s, W / s) of stride s, rounded down, but at least 1.
        """
        x, maps, layers = images, [], iter(self.convs)
        # the first two stages, of strides 1 and 2, give no map
        for index, (_, count) in enumerate(STAGES[: stages + 2]):
            x = _max_pool_2x2(x) if index else x
            for _ in range(count):
                x = conv_relu(next(layers), x)
            if index >= 2:
                maps.append(x)
        return maps


def _max_pool_2x2(x: Tensor) -> Tensor:
    """2x2 max pooling of the output of a ReLU (B, C, H, W); a side of one position keeps its size."""
    height, width = x.shape[-2:]
    if height < 2 or width < 2:
        x = F.pad(x, (0, max(2 - width, 0), 0, max(2 - height, 0)))
    return F.max_pool2d(x, 2)


class VGGHead(nn.Module):
    """VGG-16's linear layers fc6 and fc7 on RoIs, with dropout after each in training. No masks.

    Args:
        channels: channels of the feature map, C.
        model: the recipe's options.
        classes: number of object classes, without background.
    """

    mask_size = 2 * POOL_SIZE

    def __init__(self, channels: int, model: ModelOptions, classes: int) -> None:
        super().__init__()
        self.model = model
        self.fc6 = nn.Linear(channels * POOL_SIZE**2, model.fc_dim)
        self.fc7 = nn.Linear(model.fc_dim, model.fc_dim)
        for layer in (self.fc6, self.fc7):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.box = BoxPredictor(model.fc_dim, classes)
        self.mask = None

    def precompute(self, maps: Sequence[Tensor], num_rois: int) -> Sequence[Tensor]:
        """The feature map, unchanged."""
        return maps

    def levels(self, rois: Tensor) -> PyramidLevels | None:
        """None, as there is one map."""
        return None

    def spatial_pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Pooled bins (K, C, 7, 7) of rois (K, 5)."""
        (x,) = maps
        values = 4 * POOL_SIZE**2 * x.shape[1]  # of a RoI; crop_max and crop_align take four samples per bin
        max_rois = max(CPU_CHUNK_BYTES // (4 * values), 1)  # 4 bytes per float32
        chunks = roi_chunks(len(rois), rois.device, values * x.element_size(), max_rois)
        return cat_chunks([pool_rois(x, chunk.take(rois), self.model)[: chunk.count] for chunk in chunks])

    def pool5(self, maps: Sequence[Tensor], rois: Tensor, levels: PyramidLevels | None = None) -> Tensor:
        """Mean (K, C) over the pooled bins of rois (K, 5), in float32."""
        return pool_mean(maps[0], rois, self.model)

    def box_features(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """fc7 (K, D) of rois (K, 5), in float32."""
        return self.features(maps, rois).fc7.float()

    def features(self, maps: Sequence[Tensor], rois: Tensor) -> RoiFeatures:
        """Features of rois (K, 5)."""
        pooled = self.spatial_pool5(maps, rois)
        fc6 = F.dropout(F.relu(self.fc6(pooled.flatten(1))), DROPOUT, self.training)
        return RoiFeatures(F.dropout(F.relu(self.fc7(fc6)), DROPOUT, self.training), pooled)

    def forward_inference(
        self,
        maps: Sequence[Tensor],
        rois: Tensor,
        labels: Tensor | None,
        spatial: bool,
        levels: PyramidLevels | None = None,
    ) -> RoiOutput:
        """Features of rois (K, 5); there are neither masks nor spatial features."""
        return RoiOutput(self.box_features(maps, rois), None, None)

    def predict_boxes(self, fc7: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (K, classes + 1), background first, and deltas (K, classes + 1, 4), in float32."""
        return self.box(fc7)

    def mask_logits(self, maps: Sequence[Tensor], rois: Tensor, features: RoiFeatures, labels: Tensor) -> Tensor:
        """Raises ValueError, as a VGG has no mask branch."""
        raise ValueError("this detector has no mask branch")
