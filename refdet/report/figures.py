"""One image with its regions drawn on it, and the sentences that refer to them beside it, as HTML."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

from refdet.report.markup import Markup, html, joined
from refdet.report.samples import Scene

LONG_SIDE = 720  # pixels of a picture in the report: sharp on a dense screen, some 60 kB
SHOWN_SCORE = 0.5  # regions with a lower score are drawn only where a sentence refers to them
COLOURS = ("#1f6fe0", "#f58a0b", "#13a356", "#d3258f", "#00aec7", "#e2bd00", "#7d4ff0", "#e0402f")
MOST_OTHERS = 12  # of the regions that no sentence refers to, so that a crowd can still be seen
GREY = "#9aa0aa"
MOST_LETTERS = 60  # of a label

_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Key:
    """Which numbers and colours the referred objects and the regions of a scene have.

    Attributes:
        colours: one for each referred object. Those found in the same region share its colour.
        numbers: region -> the numbers, from 1, of the referred objects found in it.
        others: regions to which no sentence refers: the best `MOST_OTHERS` with `SHOWN_SCORE` or more.
    """

    colours: list[str]
    numbers: dict[int, list[int]]
    others: list[int]

    @classmethod
    def of(cls, scene: Scene) -> Key:
        """Numbers are in the order of the referred objects."""
        colours: list[str] = []
        numbers: dict[int, list[int]] = {}
        for i, one in enumerate(scene.referred):
            first = i
            if one.found and one.region is not None:
                numbers.setdefault(one.region, []).append(i + 1)
                first = numbers[one.region][0] - 1
            colours.append(COLOURS[first % len(COLOURS)])
        scores = scene.regions.scores
        others = [
            r for r in np.argsort(-scores, kind="stable").tolist() if scores[r] >= SHOWN_SCORE and r not in numbers
        ]
        return cls(colours, numbers, others[:MOST_OTHERS])


def picture(scene: Scene, pixels: np.ndarray) -> Markup:
    """A ``<figure>``: the image with regions, and below it the sentences.

    Args:
        pixels: (height, width, 3) uint8, the image.
    """
    key = Key.of(scene)
    data = io.BytesIO()
    draw(scene, pixels, key).save(data, "JPEG", quality=84, optimize=True)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    items = joined((_item(scene, i, key) for i in range(len(scene.referred))), "\n")
    drawn = len(key.others) + len(key.numbers)
    counted = f"{drawn} region{'' if drawn == 1 else 's'}"
    left_out = len(scene.regions) - drawn
    less_likely = f"; {left_out} less likely ones are not drawn" if left_out else ""
    where = f"{scene.split}, image {scene.regions.image_id}: {counted}{less_likely}"
    return html(
        """<figure>
<img alt="{alt}" src="data:image/jpeg;base64,{source}" loading="lazy">
<figcaption><span class="where">{where}</span>
<ol class="refs">
{items}
</ol></figcaption>
</figure>""",
        alt=_alt(scene), source=source, where=where, items=items,
    )  # fmt: skip


def _alt(scene: Scene) -> str:
    found = sum(one.found for one in scene.referred)
    names = ", ".join(one.category for one in scene.referred)
    return (
        f"Image {scene.regions.image_id} with its detected regions outlined; "
        f"{found} of {len(scene.referred)} referred objects found ({names})"
    )


def _item(scene: Scene, i: int, key: Key) -> Markup:
    one, colour = scene.referred[i], key.colours[i]
    quotes = joined(html("<q>{}</q>", text) for text in one.sentences)
    if one.found:
        assert one.region is not None
        category = int(scene.regions.category_ids[one.region])
        told = html("found as {}, IoU {:.2f}", scene.names.get(category, str(category)), one.iou)
        if category != one.category_id:
            told += html(' <b class="bad">(it is a {})</b>', one.category)
        chip = html('<span class="chip" style="background:{};color:{}">{}</span>', colour, _on(colour), i + 1)
    else:
        near = f"the best region has IoU {one.iou:.2f}" if one.region is not None else "there is no region"
        told = html('<b class="bad">missed</b>: {}; {}', one.category, near)
        chip = html('<span class="chip missed" style="border-color:{}">{}</span>', colour, i + 1)
    return html('<li>{}<span>{}<span class="iou-of">{}</span></span></li>', chip, quotes, told)


def draw(scene: Scene, pixels: np.ndarray, key: Key) -> Image.Image:
    """The image with a long side of `LONG_SIDE`, regions and missed objects drawn on it."""
    regions = scene.regions
    scale = LONG_SIDE / max(regions.height, regions.width)
    size = (max(round(regions.width * scale), 1), max(round(regions.height * scale), 1))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    # Little paint, since sentences name the colours of things.
    painted = [(row, GREY, 0.15) for row in key.others]
    painted += [(row, key.colours[numbers[0] - 1], 0.25) for row, numbers in key.numbers.items()]
    if regions.masks is not None:
        rles = regions.rles()
        for row, colour, opacity in painted:
            mask = Image.fromarray(np.asarray(coco_mask.decode(rles[row])) * np.uint8(255))
            smooth = mask.resize(size, Image.Resampling.BICUBIC).point(lambda v: 255 if v >= 128 else 0)
            cover = smooth.point(lambda v, opacity=opacity: round(v * opacity))
            image.paste(Image.new("RGB", size, colour), mask=cover)
            edge = ImageChops.subtract(smooth, smooth.filter(ImageFilter.MinFilter(5)))
            image.paste(Image.new("RGB", size, colour), mask=edge)
    pen = _Pen(ImageDraw.Draw(image), size)
    for row, colour, _ in painted:
        pen.outline(_scaled(regions.boxes[row], scale), colour, 2 if colour == GREY else 4)
    for i, one in enumerate(scene.referred):
        if not one.found:
            pen.dashes(_scaled(one.box, scale), key.colours[i])
    # Labels last, and the important ones first: a later label makes room for an earlier one.
    for row, colour, _ in reversed(painted):
        category = int(regions.category_ids[row])
        text = f"{scene.names.get(category, category)} {regions.scores[row]:.2f}"
        numbers = ", ".join(map(str, key.numbers.get(row, [])))
        pen.label(_scaled(regions.boxes[row], scale), f"{numbers}  {text}".strip(), colour)
    for i, one in enumerate(scene.referred):
        if not one.found:
            pen.label(_scaled(one.box, scale), f"{i + 1}  missed", key.colours[i])
    return image


@dataclass
class _Pen:
    """Draws boxes and labels, and remembers where labels are."""

    draw: ImageDraw.ImageDraw
    size: tuple[int, int]
    taken: list[_Box] = field(default_factory=list)

    def outline(self, box: _Box, colour: str, width: int) -> None:
        x1, y1, x2, y2 = self._inside(box)
        if colour != GREY:
            self.draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=width + 2)
        self.draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)

    def dashes(self, box: _Box, colour: str) -> None:
        x1, y1, x2, y2 = self._inside(box)
        for width, ink in ((7, "white"), (4, colour)):
            for x in np.arange(x1, x2, 20):
                for y in (y1, y2):
                    self.draw.line((x, y, min(x + 11, x2), y), fill=ink, width=width)
            for y in np.arange(y1, y2, 20):
                for x in (x1, x2):
                    self.draw.line((x, y, x, min(y + 11, y2)), fill=ink, width=width)

    def label(self, box: _Box, text: str, colour: str) -> None:
        text = "".join(letter if letter.isprintable() else " " for letter in text[:MOST_LETTERS])
        letters = 15 if colour == GREY else 19
        font = ImageFont.load_default(size=letters)
        width, height = self.draw.textlength(text, font=font) + 10, letters + 6.0
        x1, y1, x2, y2 = self._inside(box)
        places = [(x1, y1 - height), (x2 - width, y1 - height), (x1, y2), (x2 - width, y2),
                  (x1, y1), (x2 - width, y2 - height), (x1, y2 - height), (x2 - width, y1)]  # fmt: skip
        spots = [self._fit(x, y, width, height) for x, y in places]
        spot = min(spots, key=lambda spot: sum(_shared(spot, other) for other in self.taken))
        self.taken.append(spot)
        self.draw.rounded_rectangle(spot, radius=4, fill=colour, outline="white")
        self.draw.text((spot[0] + 5, spot[1] + height / 2), text, fill=_on(colour), font=font, anchor="lm")

    def _fit(self, x: float, y: float, width: float, height: float) -> _Box:
        x = max(0.0, min(x, self.size[0] - width - 1))
        y = max(0.0, min(y, self.size[1] - height - 1))
        return x, y, x + width, y + height

    def _inside(self, box: _Box) -> _Box:
        x1, y1 = (min(max(value, 2.0), side - 4.0) for value, side in zip(box[:2], self.size, strict=True))
        x2, y2 = (min(max(value, 2.0), side - 3.0) for value, side in zip(box[2:], self.size, strict=True))
        return x1, y1, max(x1, x2), max(y1, y2)


def _scaled(box: np.ndarray, scale: float) -> _Box:
    x1, y1, x2, y2 = (float(value) * scale for value in box)
    return x1, y1, x2, y2


def _shared(a: _Box, b: _Box) -> float:
    """Area of the intersection."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _on(colour: str) -> str:
    """Black or white, whichever reads better on a colour "#rrggbb"."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
