"""Anchors: the boxes that the region proposal network scores and moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROUNDED_BASE = 16  # pixels: the side of the square whose shapes the reference rounds and then enlarges


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float], rounded: bool = False) -> Tensor:
    """Anchors about the origin: (len(ratios) * len(sizes), 4), ratios outer, sizes inner.

    Args:
        sizes: sides in pixels of the square of equal area.
        ratios: height over width.
        rounded: as Faster R-CNN's first code did it: a square of 16 pixels is given each ratio, its sides are
            rounded, half to even, and then multiplied by ``size / 16``.
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


class Anchors(nn.Module):
    """The anchors of every cell of every map.

    Args:
        sizes: for each map the sizes of its anchors, in pixels of the network's input.
        ratios: height over width, the same on each map.
        strides: of the maps, in pixels.
        rounded: see `cell_anchors`.
    """

    def __init__(
        self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int], rounded: bool = False
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.per_cell = len(sizes[0]) * len(ratios)
        for level, level_sizes in enumerate(sizes):
            with torch.device("cpu"):  # they are numbers even where the network has yet no memory
                cell = cell_anchors(level_sizes, ratios, rounded)
            self.register_buffer(f"cell{level}", cell, persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (H * W * A, 4) of each map (B, C, H, W), row by row, the A anchors of a cell together.

        Cell (0, 0) stands at its middle, stride / 2, where RoIAlign reads it too.
        """
        anchors = []
        for level, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            height, width = x.shape[-2:]
            ys = (torch.arange(height, device=x.device, dtype=torch.float32) + 0.5) * stride
            xs = (torch.arange(width, device=x.device, dtype=torch.float32) + 0.5) * stride
            y, x_ = torch.meshgrid(ys, xs, indexing="ij")
            centres = torch.stack((x_, y, x_, y), dim=-1).reshape(-1, 1, 4)
            anchors.append((centres + self.get_buffer(f"cell{level}")).reshape(-1, 4))
        return anchors
