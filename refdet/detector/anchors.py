"""Anchors of the region proposal network.

Shape shorthand in this module:

    B: images in the batch
    C, H, W: channels, height and width of a feature map
    A: anchors per cell, len(ratios) * len(sizes); a cell is a position of a feature map

Anchors are xyxy in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROUNDED_BASE = 16  # pixels: side of the square that is reshaped to each ratio and rounded, before scaling


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float], rounded: bool = False) -> Tensor:
    """Anchors (A, 4) centered at the origin, ordered by ratio, then by size.

    Args:
        sizes: square roots of the areas, in pixels.
        ratios: height / width.
        rounded: as in the original Faster R-CNN code, reshape a square of 16 pixels to each ratio, round its sides,
            half to even, and multiply them by ``size / 16``.
    """
    if rounded:
        widths = [round(ROUNDED_BASE / ratio**0.5) for ratio in ratios]
        heights = [round(width * ratio) for width, ratio in zip(widths, ratios, strict=True)]
        shapes = torch.tensor([widths, heights], dtype=torch.float32).T.repeat_interleave(len(sizes), dim=0)
        half = shapes * (torch.tensor(sizes, dtype=torch.float32) / ROUNDED_BASE).repeat(len(ratios))[:, None] / 2
        return torch.cat((-half, half), dim=1)
    size = torch.tensor(sizes, dtype=torch.float32).repeat(len(ratios))
    root = torch.tensor(ratios, dtype=torch.float32).sqrt().repeat_interleave(len(sizes))
    half = torch.stack((size / root, size * root), dim=1) / 2
    return torch.cat((-half, half), dim=1)


class AnchorGenerator(nn.Module):
    """Generates the anchors of all cells of all feature maps.

    Args:
        sizes: anchor sizes of each map, in pixels of the network's input.
        ratios: height / width, the same for all maps.
        strides: stride of each map, in pixels of the network's input.
        rounded: round the sides as the original Faster R-CNN code does.
        offset: center of the anchors of cell (0, 0), in strides.
        torchvision: as in torchvision, round the corners of anchors to pixels and compute strides from map sizes.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        strides: Sequence[int],
        rounded: bool = False,
        offset: float = 0.5,
        torchvision: bool = False,
    ) -> None:
        super().__init__()
        self.strides, self.offset, self.torchvision = tuple(strides), offset, torchvision
        self.anchors_per_cell = len(sizes[0]) * len(ratios)
        for level, level_sizes in enumerate(sizes):
            with torch.device("cpu"):  # real values even in a model on the meta device
                cell = cell_anchors(level_sizes, ratios, rounded)
                cell = cell.round() if torchvision else cell
            self.register_buffer(f"cell{level}", cell, persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (H * W * A, 4) of each feature map (B, C, H, W), in the order (row, column, anchor).

        The center of cell (0, 0) is at stride / 2 by default, as in RoIAlign. With `torchvision`, the stride of a map
        is the size of the padded input divided by the size of the map, rounded down. The size of the padded input is
        computed as `strides[0]` times that of the finest map, which is exact if the input is padded to multiples of 32,
        as in torchvision.
        """
        anchors = []
        for level, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            height, width = x.shape[-2:]
            stride_y, stride_x = stride, stride
            if self.torchvision:
                stride_y, stride_x = (
                    self.strides[0] * finest_side // side
                    for finest_side, side in zip(maps[0].shape[-2:], (height, width), strict=True)
                )
            ys = (torch.arange(height, device=x.device, dtype=torch.float32) + self.offset) * stride_y
            xs = (torch.arange(width, device=x.device, dtype=torch.float32) + self.offset) * stride_x
            grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
            centers = torch.stack((grid_x, grid_y, grid_x, grid_y), dim=-1).reshape(-1, 1, 4)
            anchors.append((centers + self.get_buffer(f"cell{level}")).reshape(-1, 4))
        return anchors
