"""How four numbers say a box: their order and their unit, and what speaks against the form that was named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

PIXELS, SHARES, THOUSANDTHS = 0.0, 1.0, 1000.0

_SLACK = 2.0, 0.02  # pixels, and share of the side: so far beyond its image a box may reach without a word
_TINY = 1.5  # what lies within so few pixels, or thousandths, of the corner is meant otherwise
_SOME, _MANY = 0.05, 0.25  # shares of the boxes
_ENOUGH = 20  # boxes, of which one at least should use the whole range


@dataclass(frozen=True)
class BoxForm:
    """One way to write a box.

    Attributes:
        corners: whether it is ``x1 y1 x2 y2``; else ``x y width height``.
        unit: `PIXELS`; else what stands for the whole width and height of the image.
        text: for messages.
    """

    corners: bool
    unit: float
    text: str

    def to_pixels(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) of images of these (n, 2) widths and heights as half-open xyxy in pixels, (n, 4) float64."""
        boxes, sizes = np.asarray(boxes, np.float64), np.asarray(sizes, np.float64)
        far = boxes[:, 2:] if self.corners else boxes[:, :2] + boxes[:, 2:]
        corners = np.concatenate([boxes[:, :2], far], axis=1)
        return corners if self.unit == PIXELS else corners / self.unit * np.tile(sizes, 2)

    def misfits(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(n,) bool: those that this form can hardly mean: turned over, outside of their images, or next to nothing."""
        return self.stray(boxes, sizes) | self.tiny(boxes, sizes)

    def stray(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(n,) bool: those that are turned over or reach outside of their images."""
        corners = self.to_pixels(boxes, sizes)
        low, high, slack = corners[:, :2], corners[:, 2:], _SLACK[0] + _SLACK[1] * sizes
        turned = high <= low if self.corners else high < low
        wrong: np.ndarray = turned | (low < -slack) | (high > sizes + slack)
        return np.asarray(wrong.any(axis=1))

    def tiny(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(n,) bool: those of which all numbers are next to nothing in this unit."""
        if self.unit == SHARES:
            return np.zeros(len(boxes), bool)
        return (np.abs(boxes) <= _TINY).all(axis=1) & (sizes > 2 * _TINY).all(axis=1)


# In the order in which they are taken where several fit as well.
FORMS: Mapping[str, BoxForm] = MappingProxyType({
    "xywh": BoxForm(False, PIXELS, "[x, y, width, height] in pixels"),
    "xyxy": BoxForm(True, PIXELS, "[x1, y1, x2, y2] in pixels"),
    "normalized-xyxy": BoxForm(True, SHARES, "[x1, y1, x2, y2] in 0..1 of the image"),
    "normalized-xywh": BoxForm(False, SHARES, "[x, y, width, height] in 0..1 of the image"),
    "thousandths-xyxy": BoxForm(True, THOUSANDTHS, "[x1, y1, x2, y2] in 0..1000 of the image"),
    "thousandths-xywh": BoxForm(False, THOUSANDTHS, "[x, y, width, height] in 0..1000 of the image"),
})  # fmt: skip
# Of these two the boxes themselves tell the order.
BY_EVIDENCE = ("normalized", "thousandths")
NAMES = ("xywh", "xyxy", *BY_EVIDENCE, *list(FORMS)[2:])
DEFAULT = "xywh"


def settle(name: str, boxes: np.ndarray, sizes: np.ndarray) -> tuple[str, list[str]]:
    """The form in which boxes are read where ``name`` is asked for, and what the user must know of it.

    "normalized" and "thousandths" leave the order open. It is that which more of the boxes fit, and the corners that
    language models answer where both fit as well.

    Args:
        name: one of `NAMES`.
        boxes: (n, 4) numbers as they are given.
        sizes: (n, 2) widths and heights of their images in pixels.

    Returns:
        A name of `FORMS`; lines that each tell what was guessed or what speaks against it, with counts.
    """
    boxes, sizes = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(sizes, np.float64).reshape(-1, 2)
    used = boxes.any(axis=1)  # [0, 0, 0, 0] is no box in any form
    boxes, sizes = boxes[used], sizes[used]
    wrong = {form: int(FORMS[form].misfits(boxes, sizes).sum()) for form in FORMS}
    lines = []
    if name in BY_EVIDENCE:
        corners, lengths = f"{name}-xyxy", f"{name}-xywh"
        if len(boxes):
            lines.append(_order(corners, lengths, wrong, len(boxes)))
        name = lengths if wrong[lengths] < wrong[corners] else corners
    doubt = _doubt(name, boxes, sizes, wrong) if len(boxes) else None
    return name, [*lines, *([doubt] if doubt else [])]


def _order(corners: str, lengths: str, wrong: Mapping[str, int], count: int) -> str:
    if wrong[corners] == wrong[lengths]:
        return (f"note: the boxes are read as {FORMS[corners].text}; as many, {count - wrong[corners]} of {count}, fit "
                f"{FORMS[lengths].text}: if they are that, give --box-format {lengths}")  # fmt: skip
    chosen, other = (lengths, corners) if wrong[lengths] < wrong[corners] else (corners, lengths)
    return (f"note: the boxes are read as {FORMS[chosen].text}, which {wrong[chosen]} of {count} do not fit; "
            f"{FORMS[other].text} is what {wrong[other]} do not fit")  # fmt: skip


def _doubt(name: str, boxes: np.ndarray, sizes: np.ndarray, wrong: Mapping[str, int]) -> str | None:
    """What speaks against a form, and for which other."""
    form, count = FORMS[name], len(boxes)
    tiny = int(form.tiny(boxes, sizes).sum())
    if tiny > count / 2:
        return (f"warning: {tiny} of {count} boxes lie within 0..{_TINY}, but are read as {form.text}; if they are in "
                "0..1 of the image, give --box-format normalized")  # fmt: skip
    share = wrong[name] / count
    # Pixels of images of under 1000 fit thousandths as well, so that a few boxes outside do not speak for these.
    others = [o for o in FORMS if o != name and (FORMS[o].unit != THOUSANDTHS or share > _MANY)]
    best = min(others, key=lambda other: wrong[other] + (FORMS[other].unit == THOUSANDTHS) * _SOME * count)
    said = f"warning: {wrong[name]} of {count} boxes {_fault(form)} when read as {form.text}"
    if share > _SOME and wrong[best] < wrong[name] / 2:
        return (f"{said}, but {wrong[best]} when read as {FORMS[best].text}; if that is what they are, give "
                f"--box-format {_without_order(best)}")  # fmt: skip
    if form.stray(boxes, sizes).mean() > _MANY:
        return f"{said}; no other --box-format fits better: are they of images of another size?"
    return _range_doubt(name, boxes, sizes, wrong)


def _range_doubt(name: str, boxes: np.ndarray, sizes: np.ndarray, wrong: Mapping[str, int]) -> str | None:
    """Boxes fit, but use too little of the range of their unit, or end just where that of another does."""
    form, count = FORMS[name], len(boxes)
    if count < _ENOUGH or form.unit == SHARES:
        return None
    pixels = min(("xyxy", "xywh"), key=lambda order: (wrong[order], FORMS[order].corners != form.corners))
    if form.unit == THOUSANDTHS and sizes.max() < 0.95 * THOUSANDTHS and wrong[pixels] == 0:
        return (f"warning: all {count} boxes lie within their images when read as {FORMS[pixels].text}, not as "
                f"{form.text}; if that is what they are, give --box-format {pixels}")  # fmt: skip
    last = float(form.to_pixels(boxes, sizes)[:, 2:].max())
    if form.unit == PIXELS and sizes.min() >= 1.2 * THOUSANDTHS and 0.9 * THOUSANDTHS <= last <= THOUSANDTHS + 1:
        return (f"warning: none of {count} boxes reaches beyond 1000 when read as {form.text}, though all images are "
                "larger; if they are in 0..1000 of the image, give --box-format thousandths")  # fmt: skip
    return None


def _fault(form: BoxForm) -> str:
    return "reach outside their images" + (" or have x2 <= x1 or y2 <= y1" if form.corners else "")


def _without_order(name: str) -> str:
    """The name to advise: that the boxes themselves tell the order."""
    return name.split("-")[0]
