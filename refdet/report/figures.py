"""Draw an image with its regions, and caption it with the sentences that refer to them."""

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

LONG_SIDE = 640  # pixels; a picture of this size takes about 60 kB
MIN_SCORE = 0.5  # regions with a lower score are drawn only if a sentence refers to them
MAX_OTHER_REGIONS = 12  # drawn regions that no sentence refers to
GRAY = "#9aa0aa"  # of regions that no sentence refers to
WRONG = "#d8403f"  # of a model's answer
_SMALL_TEXT, _LARGE_TEXT = 15, 19  # pixels


@dataclass(frozen=True)
class Legend:
    """Numbers and colors of the referents and regions of a scene.

    Attributes:
        colors: color of each referent; referents covered by the same region share one.
        numbers: region -> the numbers, from 1, of the referents that it covers.
        others: the `MAX_OTHER_REGIONS` top-scoring regions that cover no referent and have a score of `MIN_SCORE` or
            more.
    """

    colors: list[str]
    numbers: dict[int, list[int]]
    others: list[int]

    @classmethod
    def from_scene(cls, scene: Scene) -> Legend:
        """Number the referents of a scene in order."""
        colors: list[str] = []
        numbers: dict[int, list[int]] = {}
        for number, referent in enumerate(scene.referents, 1):
            first = number  # the first referent that the same region covers gives the color
            if referent.is_covered and referent.region is not None:
                numbers.setdefault(referent.region, []).append(number)
                first = numbers[referent.region][0]
            colors.append(COLORS[(first - 1) % len(COLORS)])
        scores = scene.regions.scores
        ranked = np.argsort(-scores, kind="stable").tolist()
        others = [region for region in ranked if scores[region] >= MIN_SCORE and region not in numbers]
        return cls(colors, numbers, others[:MAX_OTHER_REGIONS])


@dataclass(frozen=True)
class Caption:
    """The caption of one referent.

    Attributes:
        number: number of the referent in the picture.
        color: "#rrggbb" of the chip with the number.
        text_color: "#rrggbb" of the number.
        is_covered: whether a region covers the referent; the chip is then filled.
        sentences: its referring expressions.
        text: category and IoU of the region that covers the referent, or of the best region if none covers it.
        warning: what is wrong besides a missed referent, "" if nothing is.
    """

    number: int
    color: str
    text_color: str
    is_covered: bool
    sentences: tuple[str, ...]
    text: str
    warning: str = ""


@dataclass(frozen=True)
class Picture:
    """An image with its regions drawn, and its captions.

    Attributes:
        alt: the image's alternative text.
        jpeg: the image file.
        title: split, image id and number of drawn regions.
        captions: captions of the referents.
    """

    alt: str
    jpeg: bytes
    title: str
    captions: tuple[Caption, ...]

    @property
    def uri(self) -> str:
        """The image file as a data URI."""
        return "data:image/jpeg;base64," + base64.b64encode(self.jpeg).decode("ascii")


def draw_picture(scene: Scene, pixels: np.ndarray, answer: Answer | None = None) -> Picture:
    """Draw the picture of an image with its regions.

    Args:
        scene: regions and referents of the image.
        pixels: the image, (height, width, 3) uint8 RGB.
        answer: a model's answer to draw too.
    """
    regions = scene.regions
    scene = replace(scene, read=lambda: regions)  # so that they are not read again
    legend = Legend.from_scene(scene)
    data = io.BytesIO()
    draw(scene, pixels, legend, answer).save(data, "JPEG", quality=80, optimize=True)
    drawn = len(legend.others) + len(legend.numbers)
    left_out = f"; {len(regions) - drawn} with lower scores not drawn" if drawn < len(regions) else ""
    title = f"{scene.split}, image {regions.image_id}: {format_count(drawn, 'region')}{left_out}"
    captions = tuple(_caption(scene, i, legend) for i in range(len(scene.referents)))
    if answer is not None:
        captions = tuple(replace(caption, warning=f"answer: IoU {answer.iou:.2f}") for caption in captions)
    return Picture(_alt(scene), data.getvalue(), title, captions)


def _alt(scene: Scene) -> str:
    """The alternative text of a picture."""
    title = f"Image {scene.regions.image_id} with its detected regions outlined"
    if not scene.referents:
        return title
    n_covered = sum(referent.is_covered for referent in scene.referents)
    names = ", ".join(referent.category for referent in scene.referents)
    return f"{title}; {format_share(n_covered, len(scene.referents), 'referred object')} found ({names})"


def _caption(scene: Scene, i: int, legend: Legend) -> Caption:
    """The caption of the referent with the index ``i``."""
    referent, color = scene.referents[i], legend.colors[i]
    warning = ""
    if referent.is_covered:
        assert referent.region is not None
        category = int(scene.regions.category_ids[referent.region])
        text = f"found as {scene.names.get(category, str(category))}, IoU {referent.iou:.2f}"
        if category != referent.category_id:
            warning = f"(actual category: {referent.category})"
    else:
        nearest = f"best IoU {referent.iou:.2f}" if referent.region is not None else "no regions"
        text = f"{referent.category}; {nearest}"
    return Caption(i + 1, color, text_color(color), referent.is_covered, referent.sentences, text, warning)


def draw(scene: Scene, pixels: np.ndarray, legend: Legend, answer: Answer | None = None) -> Image.Image:
    """The image, resized to a long side of `LONG_SIDE`, with regions, missed referents and an answer drawn on it."""
    regions = scene.regions
    scale = LONG_SIDE / max(regions.height, regions.width)
    size = (max(round(regions.width * scale), 1), max(round(regions.height * scale), 1))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    # (region, color, opacity); nearly transparent, as the colors of objects, which sentences name, must stay visible
    painted = [(row, GRAY, 0.15) for row in legend.others]
    painted += [(row, legend.colors[numbers[0] - 1], 0.25) for row, numbers in legend.numbers.items()]
    if regions.masks is not None:
        rles = regions.rles()
        for row, color, opacity in painted:
            paint_mask(image, np.asarray(coco_mask.decode(rles[row])), color, opacity, edge=5)
    canvas = Canvas(ImageDraw.Draw(image), size)
    for row, color, _ in painted:
        canvas.outline(_scale(regions.boxes[row], scale), color, 2 if color == GRAY else 4, halo=color != GRAY)
    for i, referent in enumerate(scene.referents):
        if not referent.is_covered:
            canvas.dashed_outline(_scale(referent.box, scale), legend.colors[i])
    if answer is not None:
        canvas.dashed_outline(_scale(answer.box, scale), WRONG)
        canvas.label(_scale(answer.box, scale), "answer", WRONG, _LARGE_TEXT)
    # labels last, the important ones first: later labels avoid earlier ones
    for row, color, _ in reversed(painted):
        category = int(regions.category_ids[row])
        numbers = ", ".join(map(str, legend.numbers.get(row, [])))
        text = f"{numbers}  {scene.names.get(category, category)} {regions.scores[row]:.2f}".strip()
        canvas.label(_scale(regions.boxes[row], scale), text, color, _SMALL_TEXT if color == GRAY else _LARGE_TEXT)
    for i, referent in enumerate(scene.referents):
        if not referent.is_covered:
            canvas.label(_scale(referent.box, scale), f"{i + 1}  missed", legend.colors[i], _LARGE_TEXT)
    return image


def _scale(box: np.ndarray, scale: float) -> Box:
    """A box (4,) xyxy of the image, in pixels of the resized image."""
    x1, y1, x2, y2 = (float(value) * scale for value in box)
    return x1, y1, x2, y2
