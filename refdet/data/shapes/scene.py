"""Layout of scenes: shapes, positions and occlusion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from refdet.data.shapes import masks
from refdet.data.shapes.categories import CATEGORIES, COLORS, GRAYS, PERSON, Category
from refdet.data.shapes.outlines import area, place, unit_outline

Box = tuple[float, float, float, float]

# Heights and widths of pictures, in pixels; one is chosen at random.
SIZES = ((144, 192), (144, 192), (120, 176), (144, 208), (168, 208), (192, 144), (208, 160), (176, 144))
SIDES = ((20.0, 26.0), (32.0, 42.0), (52.0, 68.0))  # of small, medium and large shapes, (min, max) in pixels
MIN_VISIBLE = 0.75  # fraction of each shape that stays visible, whatever others or the border hide
_CROWD = 254  # in `Scene.owner`, until the index of the crowd is known
_NOTHING = 255  # the background, in `Scene.owner`


@dataclass(frozen=True)
class Thing:
    """The visible part of one annotated thing.

    `box` is half-open x1 y1 x2 y2 in pixels around the visible mask, `area` the number of pixels of that mask, and
    `color` the name of `rgb`, None in a grayscale picture. A crowd is one Thing for the whole cluster of shapes.
    """

    category: Category
    color: str | None
    rgb: tuple[int, int, int]
    box: Box
    area: int
    segmentation: list[list[float]] | dict[str, Any]
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """The things of a picture in painting order, and the owner of each pixel.

    `owner` is (height, width) uint8: index into `things`, or 255 for background. A crowd is the last thing.
    """

    height: int
    width: int
    gray: bool
    things: tuple[Thing, ...]
    owner: np.ndarray


@dataclass(frozen=True)
class ScenePlan:
    """What a scene must have: whether it is grayscale, whether it has a crowd, and whether it has several persons."""

    gray: bool
    crowd: bool
    persons: bool

    @staticmethod
    def for_index(index: int) -> ScenePlan:
        """Plan of the scene with this index in its split: fixed fractions, so that small datasets have every kind."""
        return ScenePlan(gray=index % 10 == 3, crowd=index % 20 == 7, persons=index % 4 == 1)


@dataclass(frozen=True)
class _DrawnShape:
    """A shape before other shapes hide parts of it.

    `mask` is (height, width) bool, and `box` encloses it. `polygons` are COCO polygons of the outline, without its
    holes; `holed` says whether it has any. `full_area` is the outline's area in square pixels, not clipped.
    """

    category: Category
    color: str
    rgb: tuple[int, int, int]
    mask: np.ndarray
    box: Box
    polygons: list[list[float]]
    holed: bool
    full_area: float


def draw_scene(rng: np.random.Generator, plan: ScenePlan) -> Scene:
    """Draw random scenes until one succeeds: it has what `plan` demands, and 3 to 8 shapes, all mostly visible."""
    while True:
        scene = _try_scene(rng, plan)
        if scene is not None:
            return scene


def _try_scene(rng: np.random.Generator, plan: ScenePlan) -> Scene | None:
    """Draw a random scene; None if it has too few shapes, or covers too little or too much of the picture."""
    height, width = SIZES[int(rng.integers(len(SIZES)))]
    theme = PERSON if plan.persons else CATEGORIES[int(rng.integers(1, len(CATEGORIES)))]
    repeats = int(rng.integers(2, 4))
    categories = [theme] * repeats
    for _ in range(int(rng.integers(3, 9)) - repeats):
        categories.append(CATEGORIES[int(rng.integers(len(CATEGORIES)))])
    crowd = _draw_crowd(rng, plan, categories, height, width) if plan.crowd else None

    # large shapes tend to be painted first, so that they do not hide small ones
    sizes = rng.choice(len(SIDES), size=len(categories), p=(0.3, 0.45, 0.25))
    order = np.argsort(-sizes + rng.normal(0, 0.7, len(categories)), kind="stable")
    drawn: list[_DrawnShape] = []
    owner = np.full((height, width), _NOTHING, dtype=np.uint8)
    if crowd is not None:
        owner[crowd.mask] = _CROWD
    for k in order.tolist():
        for _ in range(30):  # attempts to find a position
            shape = _draw_shape(rng, categories[k], SIDES[int(sizes[k])], plan.gray, height, width)
            if shape is not None and _fits(shape, drawn, owner):
                owner[shape.mask] = len(drawn)
                drawn.append(shape)
                break
    if len(drawn) < 3 or sum(d.category == theme for d in drawn) < 2:
        return None
    if not 0.12 < float(np.mean(owner != _NOTHING)) < 0.6:
        return None
    things = [_make_thing(shape, owner == i, plan.gray) for i, shape in enumerate(drawn)]
    if crowd is not None:
        owner[owner == _CROWD] = len(things)
        things.append(_make_thing(crowd, crowd.mask, plan.gray, crowd=True))
    return Scene(height, width, plan.gray, tuple(things), owner)


def _pick_color(rng: np.random.Generator, gray: bool) -> tuple[str, tuple[int, int, int]]:
    """Pick the name and RGB of a color at random, or of a gray level."""
    if gray:
        level = GRAYS[int(rng.integers(len(GRAYS)))]
        return str(level), (level, level, level)
    name = list(COLORS)[int(rng.integers(len(COLORS)))]
    return name, COLORS[name]


def _draw_shape(
    rng: np.random.Generator,
    category: Category,
    sides: tuple[float, float],
    gray: bool,
    height: int,
    width: int,
) -> _DrawnShape | None:
    """Draw a shape at a random position, with a side in the range `sides`; None if no pixel of it is in the picture."""
    side = float(rng.uniform(*sides))
    if category == PERSON:
        side *= 1.15  # a person is narrow; this gives it as many pixels as other shapes
    size = (side * float(rng.uniform(0.92, 1.08)), side * float(rng.uniform(0.92, 1.08)))
    angle = math.radians(float(rng.uniform(-20, 20)) * (0.5 if category == PERSON else 1.0))
    # one shape in eight may extend beyond the picture
    margin = side * (float(rng.uniform(0.2, 0.4)) if rng.random() < 0.125 else 0.56)
    center = (float(rng.uniform(margin, width - margin)), float(rng.uniform(margin, height - margin)))
    color, rgb = _pick_color(rng, gray)
    return _rasterize(category, color, rgb, center, size, angle, height, width)


def _rasterize(
    category: Category,
    color: str,
    rgb: tuple[int, int, int],
    center: tuple[float, float],
    size: tuple[float, float],
    angle: float,
    height: int,
    width: int,
) -> _DrawnShape | None:
    """Rasterize the outline of a category at `center` (x, y), with `size` (width, height) and `angle` as in `place`."""
    outline = place(unit_outline(category.name), center, size, angle)
    polygons, holes = masks.drawn_polygons(outline, height, width)
    full_area = sum(area(p) for p in outline.parts) - sum(area(p) for p in outline.holes)
    mask = masks.rasterize(polygons, height, width)
    if holes:
        mask &= ~masks.rasterize(holes, height, width)
    if not mask.any():
        return None
    return _DrawnShape(category, color, rgb, mask, masks.box_of(mask), polygons, bool(outline.holes), full_area)


def _fits(shape: _DrawnShape, drawn: list[_DrawnShape], owner: np.ndarray) -> bool:
    """Whether a shape, painted on top, leaves all shapes recognizable, including itself if the border cuts it."""
    if shape.mask.sum() < MIN_VISIBLE * shape.full_area or (owner[shape.mask] == _CROWD).any():
        return False
    for i, other in enumerate(drawn):
        if _iou(shape.box, other.box) == 0:
            continue
        visible = owner == i
        remaining = visible & ~shape.mask
        overlaps = int(visible.sum()) != int(remaining.sum())
        # overlapping shapes must differ in category and clearly in color
        contrast = max(abs(a - b) for a, b in zip(shape.rgb, other.rgb, strict=True))
        if overlaps and (shape.category == other.category or contrast < 100):
            return False
        if remaining.sum() < MIN_VISIBLE * other.full_area:
            return False
        # boxes must not overlap much, least of all within a category
        if _iou(shape.box, masks.box_of(remaining)) > (0.12 if shape.category == other.category else 0.32):
            return False
    return True


def _iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def _draw_crowd(
    rng: np.random.Generator, plan: ScenePlan, used: list[Category], height: int, width: int
) -> _DrawnShape:
    """Draw a cluster of tiny shapes of a category that is not elsewhere in the scene."""
    unused = [c for c in CATEGORIES if c not in used]
    category = unused[int(rng.integers(len(unused)))]
    color, rgb = _pick_color(rng, plan.gray)
    columns, rows = int(rng.integers(4, 6)), int(rng.integers(2, 4))
    spacing = 13.0  # of the shapes in a grid, from which they deviate, in pixels
    left = float(rng.uniform(8, width - 8 - columns * spacing))
    top = float(rng.uniform(8, height - 8 - rows * spacing))
    mask = np.zeros((height, width), dtype=bool)
    for row in range(rows):
        for column in range(columns):
            x, y = rng.uniform(-2, 2, 2).tolist()
            center = (left + (column + 0.5) * spacing + x, top + (row + 0.5) * spacing + y)
            size = float(rng.uniform(10, 13))
            shape = _rasterize(category, color, rgb, center, (size, size), 0.0, height, width)
            if shape is not None:
                mask |= shape.mask
    return _DrawnShape(
        category, color, rgb, mask, masks.box_of(mask), polygons=[], holed=True, full_area=float(mask.sum())
    )


def _make_thing(shape: _DrawnShape, visible: np.ndarray, gray: bool, crowd: bool = False) -> Thing:
    """The annotated thing of a shape, given the mask of its visible part."""
    segmentation: list[list[float]] | dict[str, Any]
    if crowd:
        segmentation = masks.uncompressed_rle(visible)
    elif shape.holed or not np.array_equal(visible, shape.mask):  # the polygons are not those of the visible part
        segmentation = masks.segmentation(visible)
    else:
        segmentation = shape.polygons
    return Thing(
        shape.category,
        None if gray else shape.color,
        shape.rgb,
        masks.box_of(visible),
        int(visible.sum()),
        segmentation,
        crowd,
    )
