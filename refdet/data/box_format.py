"""Box formats: order and unit of the four numbers, and checks that boxes match a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from refdet.files.short_text import agree, format_share

PIXELS, FRACTIONS, THOUSANDTHS = 0.0, 1.0, 1000.0  # units (`BoxFormat.unit`)

# A box may exceed its image by so many pixels plus this fraction of the image's side.
_SLACK_PIXELS, _SLACK_FRACTION = 2.0, 0.02
_TINY = 1.5  # a box that is read as pixels or thousandths but has no larger number is probably in fractions
# Shares of boxes that do not fit the format, above which another one that fits better is named, and above which there
# is a warning even if none does.
_NOTABLE_SHARE, _LARGE_SHARE = 0.05, 0.25
_MIN_BOXES = 20  # with so many boxes, at least one should use most of the range of its unit


@dataclass(frozen=True)
class BoxFormat:
    """A box format.

    Attributes:
        corners: whether it is ``x1 y1 x2 y2``, else ``x y width height``.
        unit: `PIXELS`, or else the value that stands for the full width or height of the image.
        description: for messages.
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
        """Find boxes that do not make sense in this format: `outside_or_inverted`, or `tiny`.

        Args:
            boxes: (N, 4) boxes in this format.
            sizes: (N, 2) widths and heights of their images in pixels.

        Returns:
            (N,) bool mask.
        """
        return self.outside_or_inverted(boxes, sizes) | self.tiny(boxes, sizes)

    def outside_or_inverted(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Find boxes that reach outside their images, with some slack, or whose corners are in the wrong order.

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
        """Find boxes whose numbers are all within -1.5..1.5, too small for this unit; none for fractions.

        Args:
            boxes: (N, 4) boxes in this format.
            sizes: (N, 2) widths and heights of their images in pixels.

        Returns:
            (N,) bool mask.
        """
        if self.unit == FRACTIONS:
            return np.zeros(len(boxes), bool)
        return (np.abs(boxes) <= _TINY).all(axis=1) & (sizes > 2 * _TINY).all(axis=1)


# In order of preference if several fit equally well.
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
        A key of `FORMATS`, and human-readable notes, with numbers of boxes: about the order that was inferred, and a
            warning if the boxes contradict the format.
    """
    boxes, sizes = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(sizes, np.float64).reshape(-1, 2)
    is_nonzero = boxes.any(axis=1)  # [0, 0, 0, 0] is not a box in any format
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
    """Note about the order that was inferred for ``count`` boxes, from the number of misfits of each format."""
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
    """Warning about boxes that do not fit a format, naming a better one if there is one; None if all is well."""
    box_format, count = FORMATS[name], len(boxes)
    tiny = int(box_format.tiny(boxes, sizes).sum())
    if tiny > count / 2:
        return (
            f"warning: {format_share(tiny, count, 'box', 'lies')} within 0..{_TINY} but {agree(tiny, 'is')} read as "
            f"{box_format.description}; if the boxes are in 0..1 of the image, give `box_format='normalized'`"
        )
    share = misfits[name] / count
    # Pixel boxes in images smaller than 1000 also fit thousandths, so a few boxes outside their images are no evidence
    # that the boxes are in thousandths.
    candidates = [
        other for other in FORMATS if other != name and (FORMATS[other].unit != THOUSANDTHS or share > _LARGE_SHARE)
    ]

    def penalized_misfits(other: str) -> float:  # for the same reason, thousandths must fit clearly better
        return misfits[other] + (_NOTABLE_SHARE * count if FORMATS[other].unit == THOUSANDTHS else 0)

    best = min(candidates, key=penalized_misfits)
    misfit = f"{format_share(misfits[name], count, 'box')} {_describe_misfit(box_format, misfits[name])}"
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
    """Warning about boxes that fit, but use little of their unit's range or end where another unit's range ends."""
    box_format, count = FORMATS[name], len(boxes)
    if count < _MIN_BOXES or box_format.unit == FRACTIONS:
        return None
    same_order, other_order = ("xyxy", "xywh") if box_format.corners else ("xywh", "xyxy")
    # the pixel format that more boxes fit
    in_pixels = other_order if misfits[other_order] < misfits[same_order] else same_order
    # If no image has 1000 pixels, boxes in thousandths would reach beyond the pixels of some image.
    if box_format.unit == THOUSANDTHS and sizes.max() < 0.95 * THOUSANDTHS and misfits[in_pixels] == 0:
        return (
            f"warning: all {count} boxes also lie within their images when read as {FORMATS[in_pixels].description} "
            f"instead of {box_format.description}; if they are that, give `box_format='{in_pixels}'`"
        )
    # Boxes in thousandths of clearly larger images end at 1000, or 1001 if x + width was rounded, and some nearly do.
    last = float(box_format.to_pixels(boxes, sizes)[:, 2:].max())
    if box_format.unit == PIXELS and sizes.min() >= 1.2 * THOUSANDTHS and 0.9 * THOUSANDTHS <= last <= THOUSANDTHS + 1:
        return (
            f"warning: none of {count} boxes exceeds 1000 when read as {box_format.description}, though all images are "
            "larger; if they are in 0..1000 of the image, give `box_format='thousandths'`"
        )
    return None


def _describe_misfit(box_format: BoxFormat, count: int) -> str:
    """What is wrong with ``count`` misfits, as a predicate."""
    reaches = "reaches outside its image" if count == 1 else "reach outside their images"
    return reaches + (f" or {agree(count, 'has')} x2 <= x1 or y2 <= y1" if box_format.corners else "")


def _without_order(name: str) -> str:
    """Name of a format in `INFERRED_ORDER`, such as "normalized" for "normalized-xyxy"; pixel formats are unchanged."""
    return name.split("-")[0]
