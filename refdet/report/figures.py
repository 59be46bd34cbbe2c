"""HTML figure of an image with its regions and the sentences that refer to them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from refdet.files.short_text import counted
from refdet.report.markup import Markup, html, joined
from refdet.report.samples import Scene
from refdet.structures.drawing import COLOURS, Box, Pen, paint_mask, text_colour

LONG_SIDE = 720  # pixels of a picture in the report: sharp on high-density screens, about 60 kB
SHOWN_SCORE = 0.5  # regions with a lower score are drawn only if a sentence refers to them
MOST_OTHERS = 12  # regions drawn without a sentence
GREY = "#9aa0aa"


@dataclass(frozen=True)
class Key:
    """Numbers and colours of the referred objects and regions of a scene.

    Attributes:
        colours: one per referred object; objects found in the same region share its colour.
        numbers: region -> the numbers, from 1, of the referred objects found in it.
        others: regions without a sentence: the best `MOST_OTHERS` with `SHOWN_SCORE` or more.
    """

    colours: list[str]
    numbers: dict[int, list[int]]
    others: list[int]

    @classmethod
    def of(cls, scene: Scene) -> Key:
        """Number the referred objects of a scene in order."""
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
    """A ``<figure>`` with the image and its regions, and the sentences below it.

    Args:
        scene: regions and referred objects of the image.
        pixels: the image, (height, width, 3) uint8 RGB.
    """
    key = Key.of(scene)
    data = io.BytesIO()
    draw(scene, pixels, key).save(data, "JPEG", quality=84, optimize=True)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    items = joined((_item(scene, i, key) for i in range(len(scene.referred))), "\n")
    drawn = len(key.others) + len(key.numbers)
    left_out = len(scene.regions) - drawn
    less_likely = f"; {left_out} with lower scores not drawn" if left_out else ""
    where = f"{scene.split}, image {scene.regions.image_id}: {counted(drawn, 'region')}{less_likely}"
    return html(
        """<figure>
<img alt="{alt}" src="data:image/jpeg;base64,{source}" loading="lazy">
<figcaption><span class="where">{where}</span>
<ol class="refs">
{items}
</ol></figcaption>
</figure>""",
        alt=_alt(scene),
        source=source,
        where=where,
        items=items,
    )


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
            told += html(' <b class="bad">(actual category: {})</b>', one.category)
        chip = html('<span class="chip" style="background:{};color:{}">{}</span>', colour, text_colour(colour), i + 1)
    else:
        near = f"best IoU {one.iou:.2f}" if one.region is not None else "no regions"
        told = html('<b class="bad">missed</b>: {}; {}', one.category, near)
        chip = html('<span class="chip missed" style="border-color:{}">{}</span>', colour, i + 1)
    return html('<li>{}<span>{}<span class="iou-of">{}</span></span></li>', chip, quotes, told)


def draw(scene: Scene, pixels: np.ndarray, key: Key) -> Image.Image:
    """The image with a long side of `LONG_SIDE`, regions and missed objects drawn on it."""
    regions = scene.regions
    scale = LONG_SIDE / max(regions.height, regions.width)
    size = (max(round(regions.width * scale), 1), max(round(regions.height * scale), 1))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    # nearly transparent, since sentences name the colours of things
    painted = [(row, GREY, 0.15) for row in key.others]
    painted += [(row, key.colours[numbers[0] - 1], 0.25) for row, numbers in key.numbers.items()]
    if regions.masks is not None:
        rles = regions.rles()
        for row, colour, opacity in painted:
            paint_mask(image, np.asarray(coco_mask.decode(rles[row])), colour, opacity, edge=5)
    pen = Pen(ImageDraw.Draw(image), size)
    for row, colour, _ in painted:
        pen.outline(_scaled(regions.boxes[row], scale), colour, 2 if colour == GREY else 4, halo=colour != GREY)
    for i, one in enumerate(scene.referred):
        if not one.found:
            pen.dashes(_scaled(one.box, scale), key.colours[i])
    # labels last, the important ones first: later labels avoid earlier ones
    for row, colour, _ in reversed(painted):
        category = int(regions.category_ids[row])
        text = f"{scene.names.get(category, category)} {regions.scores[row]:.2f}"
        numbers = ", ".join(map(str, key.numbers.get(row, [])))
        pen.label(
            _scaled(regions.boxes[row], scale), f"{numbers}  {text}".strip(), colour, 15 if colour == GREY else 19
        )
    for i, one in enumerate(scene.referred):
        if not one.found:
            pen.label(_scaled(one.box, scale), f"{i + 1}  missed", key.colours[i], 19)
    return image


def _scaled(box: np.ndarray, scale: float) -> Box:
    x1, y1, x2, y2 = (float(value) * scale for value in box)
    return x1, y1, x2, y2
