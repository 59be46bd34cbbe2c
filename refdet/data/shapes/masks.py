"""Conversion between polygons, masks and COCO segmentations."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.shapes.outlines import Outline, area, clip


def to_coco_polygon(points: np.ndarray) -> list[float]:
    """Points (K, 2) as a COCO polygon: [x0, y0, x1, y1, ...] with two decimals."""
    return [round(float(v), 2) for v in points.reshape(-1)]


def rasterize(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """Fill the union of COCO polygons as pycocotools does; returns a bool (height, width) mask."""
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    rles = coco_mask.frPyObjects(polygons, height, width)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


def drawn_polygons(outline: Outline, height: int, width: int) -> tuple[list[list[float]], list[list[float]]]:
    """Clip a placed outline to the picture; returns its parts and its holes as COCO polygons, without tiny ones."""

    def visible(polygons: tuple[np.ndarray, ...]) -> list[list[float]]:
        clipped = [clip(p, height, width) for p in polygons]
        return [to_coco_polygon(p) for p in clipped if len(p) >= 3 and area(p) >= 1.0]

    return visible(outline.parts), visible(outline.holes)


def trace(mask: np.ndarray) -> tuple[list[list[float]], bool]:
    """Trace the pixel edges of a bool (H, W) mask.

    Returns:
        One COCO polygon per 4-connected part, with corners on the pixel grid so that pycocotools fills exactly the
        mask, and whether the mask has a hole, which polygons cannot represent.
    """
    padded = np.pad(mask, 1)
    core = padded[1:-1, 1:-1]
    # Pixel edges on the border of the mask, clockwise: along the top of a pixel to the right, down its right side, ...
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner x y -> moves of the edges that start there
    sides = (  # the pixels across that side, where the edge starts relative to its pixel, and its move
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    for neighbor, (x0, y0), move in sides:
        for y, x in np.argwhere(core & ~neighbor).tolist():
            edges.setdefault((x + x0, y + y0), []).append(move)
    polygons: list[list[float]] = []
    has_hole = False
    while edges:
        corners, doubled_area = _pop_loop(edges, next(iter(edges)))
        if doubled_area > 0:
            polygons.append([float(v) for corner in corners for v in corner])
        else:
            has_hole = True
    return polygons, has_hole


def _pop_loop(
    edges: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]
) -> tuple[list[tuple[int, int]], int]:
    """Remove a closed loop of edges; returns its corners, and twice its area (negative around a hole)."""
    x, y = start
    heading = (0, 0)
    corners: list[tuple[int, int]] = []
    doubled_area = 0
    while True:
        moves = edges[x, y]
        # where pixels touch at a corner, turning right follows the current pixel
        right = (-heading[1], heading[0])
        move = right if right in moves else moves[0]
        moves.remove(move)
        if not moves:
            del edges[x, y]
        if move != heading:
            corners.append((x, y))
        doubled_area += x * move[1] - y * move[0]
        x, y, heading = x + move[0], y + move[1], move
        # back at the start, unless the boundary touches itself there and continues to the right
        if (x, y) == start and (-heading[1], heading[0]) not in edges.get(start, []):
            break
    # the start is no corner if the loop arrives there in the direction in which it left
    if len(corners) > 1 and _direction(corners[0], corners[1]) == heading:
        corners = corners[1:]
    return corners, doubled_area


def _direction(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The move of the edges from a corner to the next one."""
    return int(np.sign(b[0] - a[0])), int(np.sign(b[1] - a[1]))


def uncompressed_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a bool (H, W) mask as an uncompressed COCO RLE: column-major run lengths, zeros first."""
    pixels = mask.reshape(-1, order="F")
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], ends, [pixels.size]])).tolist()
    if pixels[0]:
        runs = [0, *runs]
    return {"counts": [int(r) for r in runs], "size": [int(s) for s in mask.shape]}


def segmentation(mask: np.ndarray) -> list[list[float]] | dict[str, Any]:
    """Make the COCO segmentation of a bool (H, W) mask: polygons, or RLE if it has a hole."""
    polygons, has_hole = trace(mask)
    return uncompressed_rle(mask) if has_hole else polygons


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Half-open x1 y1 x2 y2 of a non-empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
