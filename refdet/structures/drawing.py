"""Drawing of boxes, masks and labels on a PIL image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from refdet.files.short_text import format_share

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
"""Half-open ``x1 y1 x2 y2`` in pixels."""

COLORS = ("#1f6fe0", "#f58a0b", "#13a356", "#d3258f", "#00aec7", "#e2bd00", "#7d4ff0", "#e0402f")
MAX_LABEL_LENGTH = 60  # characters
MAX_LABELED_AREA = 1 / 3  # fraction of the image that labels may cover
_LABEL_MARGIN = (5, 3)  # pixels between a label's text and the edge of its background, along x and y


@dataclass(frozen=True)
class DrawnRegion:
    """A region to draw.

    Attributes:
        box: half-open xyxy in pixels of the image.
        label: the text next to the box.
        mask: (H, W) uint8, 1 on the region, or None.
    """

    box: Box
    label: str
    mask: np.ndarray | None


def draw_regions(pixels: np.ndarray, regions: Sequence[DrawnRegion]) -> Image.Image:
    """A copy of an image with regions drawn on it, the first on top, in eight colors by turns.

    Once the labels cover `MAX_LABELED_AREA`, or one is wider than the image, the remaining regions get none, with a
    note in the log.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        regions: most important first.
    """
    image = Image.fromarray(pixels)
    long_side = max(image.size)
    # in pixels: for a COCO image of 640 pixels, lines of 2 and a font of 16
    line, font_size = max(1, round(long_side / 320)), min(max(10, round(long_side / 40)), 24)
    colored = [(region, COLORS[i % len(COLORS)]) for i, region in enumerate(regions)]
    for region, color in reversed(colored):
        if region.mask is not None:
            paint_mask(image, region.mask, color, opacity=0.35, edge=1 + 2 * line)
    canvas = Canvas(ImageDraw.Draw(image), image.size)
    for region, color in reversed(colored):
        canvas.outline(region.box, color, line, halo=False)
    remaining_area = MAX_LABELED_AREA * image.width * image.height
    for index, (region, color) in enumerate(colored):
        width, height = canvas.label_size(region.label, font_size)
        if width * height > remaining_area or width > image.width:
            unlabeled = format_share(len(colored) - index, len(colored), "region", "has")
            log.warning("note: %s no label, as labels would cover the picture", unlabeled)
            break
        remaining_area -= width * height
        canvas.label(region.box, region.label, color, font_size)
    return image


def paint_mask(image: Image.Image, mask: np.ndarray, color: str, opacity: float, edge: int) -> None:
    """Paint a mask onto an image, translucent and with an opaque edge.

    Args:
        image: in mode RGB; modified in place.
        mask: (H, W) uint8 of 0 and 1, resized to the image if necessary.
        color: "#rrggbb".
        opacity: opacity of the inside, 0..1.
        edge: side in pixels of the minimum filter that makes the edge, odd; the edge is (side - 1) / 2 pixels wide.
    """
    full = Image.fromarray(mask * np.uint8(255))
    if full.size != image.size:
        full = full.resize(image.size, Image.Resampling.BICUBIC).point(lambda v: 255 if v >= 128 else 0)
    paint = Image.new("RGB", image.size, color)
    image.paste(paint, mask=full.point(lambda v: round(v * opacity)))
    image.paste(paint, mask=ImageChops.subtract(full, full.filter(ImageFilter.MinFilter(edge))))


@dataclass
class Canvas:
    """Draws boxes and labels on an image, each label where it overlaps earlier ones least.

    Attributes:
        draw: PIL's drawing interface of the image.
        size: width and height of the image in pixels.
        occupied: boxes of the labels drawn so far.
    """

    draw: ImageDraw.ImageDraw
    size: tuple[int, int]
    occupied: list[Box] = field(default_factory=list)

    def outline(self, box: Box, color: str, width: int, *, halo: bool) -> None:
        """Draw a box, with a white line around it if ``halo``."""
        x1, y1, x2, y2 = self._clip(box)
        if halo:
            self.draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=width + 2)
        self.draw.rectangle((x1, y1, x2, y2), outline=color, width=width)

    def dashed_outline(self, box: Box, color: str) -> None:
        """Draw a dashed box on a wider white one."""
        x1, y1, x2, y2 = self._clip(box)
        dash, period = 11, 20  # pixels; the rest of the period is a gap
        for width, ink in ((7, "white"), (4, color)):
            for x in np.arange(x1, x2, period):
                for y in (y1, y2):
                    self.draw.line((x, y, min(x + dash, x2), y), fill=ink, width=width)
            for y in np.arange(y1, y2, period):
                for x in (x1, x2):
                    self.draw.line((x, y, x, min(y + dash, y2)), fill=ink, width=width)

    def label(self, box: Box, text: str, color: str, font_size: int) -> None:
        """Write a text next to a box, on a background of the box's color.

        Args:
            box: half-open xyxy in pixels of the image.
            text: the text, truncated to `MAX_LABEL_LENGTH`.
            color: color of the background, "#rrggbb".
            font_size: in pixels.
        """
        font = ImageFont.load_default(size=font_size)
        width, height = self.label_size(text, font_size)
        x1, y1, x2, y2 = self._clip(box)
        corners = [  # top left corners of the label: above and below the box, then inside each of its corners
            (x1, y1 - height),
            (x2 - width, y1 - height),
            (x1, y2),
            (x2 - width, y2),
            (x1, y1),
            (x2 - width, y2 - height),
            (x1, y2 - height),
            (x2 - width, y1),
        ]
        candidates = [self._move_inside(x, y, width, height) for x, y in corners]
        # the first of the positions that overlap earlier labels least
        background = min(candidates, key=lambda label: sum(_intersection_area(label, other) for other in self.occupied))
        self.occupied.append(background)
        self.draw.rounded_rectangle(background, radius=4, fill=color, outline="white")
        left_middle = background[0] + _LABEL_MARGIN[0], background[1] + height / 2
        self.draw.text(left_middle, _printable(text), fill=text_color(color), font=font, anchor="lm")

    def label_size(self, text: str, font_size: int) -> tuple[float, float]:
        """Width and height in pixels of the background of a label."""
        length = self.draw.textlength(_printable(text), font=ImageFont.load_default(size=font_size))
        return length + 2 * _LABEL_MARGIN[0], float(font_size + 2 * _LABEL_MARGIN[1])

    def _move_inside(self, x: float, y: float, width: float, height: float) -> Box:
        """The box of a label at (x, y), moved into the image."""
        x = max(0.0, min(x, self.size[0] - width - 1))
        y = max(0.0, min(y, self.size[1] - height - 1))
        return x, y, x + width, y + height

    def _clip(self, box: Box) -> Box:
        """A box clipped to 2 or 3 pixels inside the image, so that its whole outline and halo are visible."""
        x1, y1 = (min(max(value, 2.0), side - 4.0) for value, side in zip(box[:2], self.size, strict=True))
        x2, y2 = (min(max(value, 2.0), side - 3.0) for value, side in zip(box[2:], self.size, strict=True))
        return x1, y1, max(x1, x2), max(y1, y2)


def text_color(background: str) -> str:
    """Black or white, whichever is more legible on a background "#rrggbb"."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # brightness 0..255, as in JPEG
    return "#000000" if luma > 140 else "#ffffff"


def _printable(text: str) -> str:
    """The text of a label, truncated, with spaces for characters that cannot be drawn."""
    return "".join(character if character.isprintable() else " " for character in text[:MAX_LABEL_LENGTH])


def _intersection_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
