"""Picture of an image with its regions, and captions with the sentences that refer to them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from refdet.files.short_text import format_count, format_share
from refdet.report.samples import Answer, Scene
from refdet.structures.drawing import COLORS, Box, Canvas, paint_mask, text_color

LONG_SIDE = 640  # pixels of a picture in the report, about 60 kB
SHOWN_SCORE = 0.5  # regions with a lower score are drawn only if a sentence refers to them
MAX_OTHER_REGIONS = 12  # regions drawn without a sentence
GRAY = "#9aa0aa"
WRONG = "#d8403f"


@dataclass(frozen=True)
class Legend:
    """Numbers and colors of the referred objects and regions of a scene.

    Attributes:
        colors: color of each referred object; objects found in the same region share one.
        numbers: region -> the numbers, from 1, of the referred objects found in it.
        others: regions without a sentence: the `MAX_OTHER_REGIONS` best-scoring ones with `SHOWN_SCORE` or more.
    """

    colors: list[str]
    numbers: dict[int, list[int]]
    others: list[int]

    @classmethod
    def from_scene(cls, scene: Scene) -> Legend:
        """Number the referred objects of a scene in order."""
        colors: list[str] = []
        numbers: dict[int, list[int]] = {}
        for i, obj in enumerate(scene.referents):
            first = i
            if obj.found and obj.region is not None:
                numbers.setdefault(obj.region, []).append(i + 1)
                first = numbers[obj.region][0] - 1
            colors.append(COLORS[first % len(COLORS)])
        scores = scene.regions.scores
        others = [
            r for r in np.argsort(-scores, kind="stable").tolist() if scores[r] >= SHOWN_SCORE and r not in numbers
        ]
        return cls(colors, numbers, others[:MAX_OTHER_REGIONS])


@dataclass(frozen=True)
class Caption:
    """The caption of one referred object.

    Attributes:
        number: number of the object in the picture.
        color: "#rrggbb" of the chip with the number.
        ink: color of the number.
        fill: whether the chip is filled, as the object was found.
        sentences: its referring expressions.
        text: what was found.
        bad_first: a warning before the text, or "".
        bad: a warning after the text, or "".
    """

    number: int
    color: str
    ink: str
    fill: bool
    sentences: tuple[str, ...]
    text: str
    bad_first: str = ""
    bad: str = ""


@dataclass(frozen=True)
class Picture:
    """An image with its regions drawn, and its captions.

    Attributes:
        alt: what it shows, in words.
        jpeg: the file.
        where: split and image.
        items: captions of the referred objects.
    """

    alt: str
    jpeg: bytes
    where: str
    items: tuple[Caption, ...]

    @property
    def uri(self) -> str:
        """The file as a data URI."""
        return "data:image/jpeg;base64," + base64.b64encode(self.jpeg).decode("ascii")


def picture(scene: Scene, pixels: np.ndarray, answer: Answer | None = None) -> Picture:
    """The picture of an image with its regions.

    Args:
        scene: regions and referred objects of the image.
        pixels: the image, (height, width, 3) uint8 RGB.
        answer: a model's answer to draw too.
    """
    regions = scene.regions
    scene = replace(scene, read=lambda: regions)  # read once
    legend = Legend.from_scene(scene)
    data = io.BytesIO()
    draw(scene, pixels, legend, answer).save(data, "JPEG", quality=80, optimize=True)
    drawn = len(legend.others) + len(legend.numbers)
    left_out = len(scene.regions) - drawn
    less_likely = f"; {left_out} with lower scores not drawn" if left_out else ""
    where = f"{scene.split}, image {scene.regions.image_id}: {format_count(drawn, 'region')}{less_likely}"
    items = tuple(_caption(scene, i, legend) for i in range(len(scene.referents)))
    if answer is not None:
        items = tuple(replace(item, bad=f"answer: IoU {answer.iou:.2f}") for item in items)
    return Picture(_alt(scene), data.getvalue(), where, items)


def _alt(scene: Scene) -> str:
    title = f"Image {scene.regions.image_id} with its detected regions outlined"
    if not scene.referents:
        return title
    found = sum(obj.found for obj in scene.referents)
    names = ", ".join(obj.category for obj in scene.referents)
    return f"{title}; {format_share(found, len(scene.referents), 'referred object')} found ({names})"


def _caption(scene: Scene, i: int, legend: Legend) -> Caption:
    obj, color = scene.referents[i], legend.colors[i]
    head = (i + 1, color, text_color(color), obj.found, obj.sentences)
    if obj.found:
        assert obj.region is not None
        category = int(scene.regions.category_ids[obj.region])
        wrong = f"(actual category: {obj.category})" if category != obj.category_id else ""
        return Caption(*head, f"found as {scene.names.get(category, str(category))}, IoU {obj.iou:.2f}", bad=wrong)
    near = f"best IoU {obj.iou:.2f}" if obj.region is not None else "no regions"
    return Caption(*head, f": {obj.category}; {near}", bad_first="missed")


def draw(scene: Scene, pixels: np.ndarray, legend: Legend, answer: Answer | None = None) -> Image.Image:
    """The image with a long side of `LONG_SIDE`, regions, missed objects and an answer drawn on it."""
    regions = scene.regions
    scale = LONG_SIDE / max(regions.height, regions.width)
    size = (max(round(regions.width * scale), 1), max(round(regions.height * scale), 1))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    # nearly transparent, since sentences name the colors of things
    painted = [(row, GRAY, 0.15) for row in legend.others]
    painted += [(row, legend.colors[numbers[0] - 1], 0.25) for row, numbers in legend.numbers.items()]
    if regions.masks is not None:
        rles = regions.rles()
        for row, color, opacity in painted:
            paint_mask(image, np.asarray(coco_mask.decode(rles[row])), color, opacity, edge=5)
    canvas = Canvas(ImageDraw.Draw(image), size)
    for row, color, _ in painted:
        canvas.outline(_scale(regions.boxes[row], scale), color, 2 if color == GRAY else 4, halo=color != GRAY)
    for i, obj in enumerate(scene.referents):
        if not obj.found:
            canvas.dashed_outline(_scale(obj.box, scale), legend.colors[i])
    if answer is not None:
        canvas.dashed_outline(_scale(answer.box, scale), WRONG)
        canvas.label(_scale(answer.box, scale), "answer", WRONG, 19)
    # labels last, the important ones first: later labels avoid earlier ones
    for row, color, _ in reversed(painted):
        category = int(regions.category_ids[row])
        text = f"{scene.names.get(category, category)} {regions.scores[row]:.2f}"
        numbers = ", ".join(map(str, legend.numbers.get(row, [])))
        canvas.label(
            _scale(regions.boxes[row], scale), f"{numbers}  {text}".strip(), color, 15 if color == GRAY else 19
        )
    for i, obj in enumerate(scene.referents):
        if not obj.found:
            canvas.label(_scale(obj.box, scale), f"{i + 1}  missed", legend.colors[i], 19)
    return image


def _scale(box: np.ndarray, scale: float) -> Box:
    x1, y1, x2, y2 = (float(value) * scale for value in box)
    return x1, y1, x2, y2
