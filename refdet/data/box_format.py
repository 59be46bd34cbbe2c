"""Box formats: order and unit of the four numbers, and checks that boxes match a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from refdet.files.short_text import agree, format_share

# Values of `BoxFormat.unit`; 0 is only a mark for pixels, nothing is divided by it.
PIXELS, FRACTIONS, THOUSANDTHS = 0.0, 1.0, 1000.0

# A box may reach outside its image by this many pixels plus this fraction of the image's side.
_SLACK_PIXELS, _SLACK_FRACTION = 2.0, 0.02
# A box whose numbers are all at most this is probably in fractions, not in pixels or thousandths.
_TINY = 1.5
# Above the first share of boxes that do not fit the format, a warning names another format, if one fits much better;
# above the second, there is a warning even if none does.
_NOTABLE_SHARE, _LARGE_SHARE = 0.05, 0.25
_MIN_BOXES = 20  # from which `_range_warning` judges: among fewer, it is no surprise that none is near the maximum


@dataclass(frozen=True)
class BoxFormat:
    """A box format.

    Attributes:
        corners: whether a box is ``x1 y1 x2 y2``, else ``x y width height``.
        unit: `PIXELS`, or else the number that stands for the full width or height of the image.
        description: the format in words, for messages.
    """

    corners: bool
    unit: float
    description: str

    def to_pixels(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Convert boxes to half-open xyxy in pixels.

        Args:
            boxes: (N, 4) boxes in this format.
            sizes: (N, 2) widths and heights of their images in pixels.

        Returns:
            (N, 4) float64 boxes ``x1 y1 x2 y2`` in pixels.
        """
        boxes, sizes = np.asarray(boxes, np.float64), np.asarray(sizes, np.float64)
        second_corners = boxes[:, 2:] if self.corners else boxes[:, :2] + boxes[:, 2:]
        corners = np.concatenate([boxes[:, :2], second_corners], axis=1)
        return corners if self.unit == PIXELS else corners / self.unit * np.tile(sizes, 2)

    def misfits(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Find boxes that make no sense in this format: those that are `outside_or_inverted` or `tiny`.

        Args:
            boxes: (N, 4) boxes in this format.
            sizes: (N, 2) widths and heights of their images in pixels.

        Returns:
            (N,) bool mask.
        """
        return self.outside_or_inverted(boxes, sizes) | self.tiny(boxes, sizes)

    def outside_or_inverted(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Find boxes that reach outside their images, with some slack, or whose second corner is not beyond the first.

        A width or height of 0 is allowed if it is given as such, but x2 = x1 or y2 = y1 is not.

        Args:
            boxes: (N, 4) boxes in this format.
            sizes: (N, 2) widths and heights of their images in pixels.

        Returns:
            (N,) bool mask.
        """
        corners = self.to_pixels(boxes, sizes)
        low, high, slack = corners[:, :2], corners[:, 2:], _SLACK_PIXELS + _SLACK_FRACTION * sizes
        inverted = high <= low if self.corners else high < low
        invalid = inverted | (low < -slack) | (high > sizes + slack)
        return np.asarray(invalid.any(axis=1))

    def tiny(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Find boxes whose numbers are all within -1.5..1.5, which is too small for pixels and thousandths.

        In fractions no box is tiny, nor in an image of at most 3 pixels in width or height.

        Args:
            boxes: (N, 4) boxes in this format.
            sizes: (N, 2) widths and heights of their images in pixels.

        Returns:
            (N,) bool mask.
        """
        if self.unit == FRACTIONS:
            return np.zeros(len(boxes), bool)
        return (np.abs(boxes) <= _TINY).all(axis=1) & (sizes > 2 * _TINY).all(axis=1)


# In order of preference: a warning names the first of several formats that fit equally well.
FORMATS: Mapping[str, BoxFormat] = MappingProxyType(
    {
        "xywh": BoxFormat(corners=False, unit=PIXELS, description="[x, y, width, height] in pixels"),
        "xyxy": BoxFormat(corners=True, unit=PIXELS, description="[x1, y1, x2, y2] in pixels"),
        "normalized-xyxy": BoxFormat(corners=True, unit=FRACTIONS, description="[x1, y1, x2, y2] in 0..1 of the image"),
        "normalized-xywh": BoxFormat(
            corners=False, unit=FRACTIONS, description="[x, y, width, height] in 0..1 of the image"
        ),
        "thousandths-xyxy": BoxFormat(
            corners=True, unit=THOUSANDTHS, description="[x1, y1, x2, y2] in 0..1000 of the image"
        ),
        "thousandths-xywh": BoxFormat(
            corners=False, unit=THOUSANDTHS, description="[x, y, width, height] in 0..1000 of the image"
        ),
    }
)
INFERRED_ORDER = ("normalized", "thousandths")
"""Formats that users can request without the order of the numbers, which is inferred from the boxes."""
NAMES = ("xywh", "xyxy", *INFERRED_ORDER, *(name for name in FORMATS if name not in ("xywh", "xyxy")))
"""Formats that users can request."""
DEFAULT_FORMAT = "xywh"


def resolve_box_format(name: str, boxes: np.ndarray, sizes: np.ndarray) -> tuple[str, list[str]]:
    """Choose the format to read boxes in.

    "normalized" and "thousandths" leave the order open. The order that more boxes fit is chosen, or xyxy, which
    language models usually produce, if both fit equally well.

    Args:
        name: the requested format, one of `NAMES`.
        boxes: (N, 4) boxes as given.
        sizes: (N, 2) widths and heights of their images in pixels.

    Returns:
        A key of `FORMATS`, and up to two messages: a note about the order if it was inferred, and a warning if the
            boxes do not seem to be in the format.
    """
    boxes, sizes = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(sizes, np.float64).reshape(-1, 2)
    is_nonzero = boxes.any(axis=1)  # [0, 0, 0, 0] says nothing about the format
    boxes, sizes = boxes[is_nonzero], sizes[is_nonzero]
    misfits = {key: int(box_format.misfits(boxes, sizes).sum()) for key, box_format in FORMATS.items()}
    notes = []
    if name in INFERRED_ORDER:
        xyxy, xywh = f"{name}-xyxy", f"{name}-xywh"
        if len(boxes):
            notes.append(_order_note(xyxy, xywh, misfits, len(boxes)))
        name = xywh if misfits[xywh] < misfits[xyxy] else xyxy
    warning = _format_warning(name, boxes, sizes, misfits) if len(boxes) else None
    return name, [*notes, *([warning] if warning else [])]


def _order_note(xyxy: str, xywh: str, misfits: Mapping[str, int], count: int) -> str:
    """Note about the order that was inferred for ``count`` boxes, given the number of misfits in each format."""
    if misfits[xyxy] == misfits[xywh]:
        return (
            f"note: reading boxes as {FORMATS[xyxy].description}; if they are {FORMATS[xywh].description}, which "
            f"equally many ({count - misfits[xyxy]} of {count}) fit, give `box_format='{xywh}'`"
        )
    chosen, other = (xywh, xyxy) if misfits[xywh] < misfits[xyxy] else (xyxy, xywh)
    return (
        f"note: reading boxes as {FORMATS[chosen].description}, which fits {count - misfits[chosen]} of {count}, "
        f"rather than {FORMATS[other].description}, which fits {count - misfits[other]}"
    )


def _format_warning(name: str, boxes: np.ndarray, sizes: np.ndarray, misfits: Mapping[str, int]) -> str | None:
    """Warning that boxes do not seem to be in a format, naming a better one if there is one; None if all is well."""
    box_format, count = FORMATS[name], len(boxes)
    tiny = int(box_format.tiny(boxes, sizes).sum())
    if tiny > count / 2:
        return (
            f"warning: {format_share(tiny, count, 'box', 'lies')} within -{_TINY}..{_TINY} but "
            f"{agree(tiny, 'is')} read as {box_format.description}; if the boxes are in 0..1 of the image, give "
            "`box_format='normalized'`"
        )
    share = misfits[name] / count
    # Boxes in pixels of images smaller than 1000 pixels also fit thousandths, and so do those that reach a bit outside
    # their images. A few of these are no evidence for thousandths.
    candidates = [
        other for other in FORMATS if other != name and (FORMATS[other].unit != THOUSANDTHS or share > _LARGE_SHARE)
    ]

    def penalized_misfits(other: str) -> float:  # for the same reason, thousandths must fit better by some margin
        return misfits[other] + (_NOTABLE_SHARE * count if FORMATS[other].unit == THOUSANDTHS else 0)

    best = min(candidates, key=penalized_misfits)
    misfit = f"{format_share(misfits[name], count, 'box')} {_describe_misfits(box_format, boxes, misfits[name], tiny)}"
    problem = f"warning: {misfit} when read as {box_format.description}"
    if share > _NOTABLE_SHARE and misfits[best] < misfits[name] / 2:
        return (
            f"{problem}, but {misfits[best]} when read as {FORMATS[best].description}; if they are that, give "
            f"`box_format='{_without_order(best)}'`"
        )
    if box_format.outside_or_inverted(boxes, sizes).mean() > _LARGE_SHARE:
        return (
            f"{problem}; no other `box_format` fits better, so check that the boxes refer to images of the same sizes"
        )
    return _range_warning(name, boxes, sizes, misfits)


def _range_warning(name: str, boxes: np.ndarray, sizes: np.ndarray, misfits: Mapping[str, int]) -> str | None:
    """Warning about boxes that fit a format, but whose largest numbers suggest another unit; None if they do not.

    Either they are read as thousandths, but all lie within their images in pixels too, or they are read as pixels of
    images larger than 1000, but none is beyond 1000.
    """
    box_format, count = FORMATS[name], len(boxes)
    if count < _MIN_BOXES or box_format.unit == FRACTIONS:
        return None
    same_order, other_order = ("xyxy", "xywh") if box_format.corners else ("xywh", "xyxy")
    # the format in pixels that more boxes fit; if both fit equally many, the one with the same order
    in_pixels = other_order if misfits[other_order] < misfits[same_order] else same_order
    # If all images are smaller than 1000 pixels, some boxes in thousandths should reach outside when read as pixels.
    if box_format.unit == THOUSANDTHS and sizes.max() < 0.95 * THOUSANDTHS and misfits[in_pixels] == 0:
        return (
            f"warning: all {count} boxes also lie within their images when read as {FORMATS[in_pixels].description} "
            f"instead of {box_format.description}; if they are that, give `box_format='{in_pixels}'`"
        )
    # If boxes in thousandths are read as pixels of clearly larger images, the largest x2 or y2 is close to 1000; it is
    # at most 1001, if x and width were both rounded up.
    largest = float(box_format.to_pixels(boxes, sizes)[:, 2:].max())
    if (
        box_format.unit == PIXELS
        and sizes.min() >= 1.2 * THOUSANDTHS
        and 0.9 * THOUSANDTHS <= largest <= THOUSANDTHS + 1
    ):
        return (
            f"warning: none of {count} boxes exceeds 1000 when read as {box_format.description}, though all images are "
            "larger; if they are in 0..1000 of the image, give `box_format='thousandths'`"
        )
    return None


def _describe_misfits(box_format: BoxFormat, boxes: np.ndarray, count: int, tiny: int) -> str:
    """What is wrong with ``count`` misfits among boxes, of which ``tiny`` are tiny, as a verb phrase."""
    reaches = "reaches outside its image" if count == 1 else "reach outside their images"
    problems = [reaches]
    if box_format.corners:
        problems.append(f"{agree(count, 'has')} x2 <= x1 or y2 <= y1")
    elif (boxes[:, 2:] < 0).any():
        problems.append(f"{agree(count, 'has')} a negative width or height")
    if tiny:
        problems.append(f"{agree(count, 'lies')} within -{_TINY}..{_TINY}")
    return " or ".join(problems)


def _without_order(name: str) -> str:
    """Name without the order, such as "normalized" for "normalized-xyxy"; "xywh" and "xyxy" are unchanged."""
    return name.split("-")[0]
