"""Box layouts of the formats in which others distribute REFER, to find COCO's annotation of a box.

A layout is the order and unit of the four numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Box = tuple[float, float, float, float]


# Each of these functions converts a box x y w h of COCO, in pixels, to a layout. ``width`` and ``height`` are those of
# the image.


def _xyxy(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    return x, y, x + w, y + h


def _normalized(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    return x / width, y / height, (x + w) / width, (y + h) / height


def _padded(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    """Corners in fractions of the square around the image, which LLaVA pads to the longer side on both sides."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return _normalized(x + left, y + top, w, h, side, side)


def _thousandths(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    x1, y1, x2, y2 = _normalized(x, y, w, h, width, height)
    return 1000 * x1, 1000 * y1, 1000 * x2, 1000 * y2


def _yxyx(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    x1, y1, x2, y2 = _normalized(x, y, w, h, width, height)
    return y1, x1, y2, x2


LAYOUTS: dict[str, Callable[[float, float, float, float, int, int], Box]] = {
    "xywh": lambda x, y, w, h, width, height: (x, y, w, h),
    "xyxy": _xyxy,
    "normalized-xyxy": _normalized,
    "normalized-yxyx": _yxyx,
    "padded-xyxy": _padded,
    "thousandths-xyxy": _thousandths,
}

# Relative, or absolute for numbers below 1: several times the rounding error of float32, as x + w is the sum of two
# rounded numbers.
_FLOAT32_TOLERANCE = 1e-6
_MAX_DECIMALS = 6  # numbers with more decimal places are taken as not rounded


def rounding_unit(numbers: Iterable[float]) -> float:
    """Return the unit to which numbers are rounded, such as 0.01 if the longest has two decimals; 0 if not rounded."""
    max_decimals = 0
    for number in numbers:
        mantissa, _, exponent = f"{number:.15g}".partition("e")
        decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        if decimals > _MAX_DECIMALS:
            return 0.0
        max_decimals = max(max_decimals, decimals)
    return float(10**-max_decimals)


def agreement(box: Iterable[float], other: Iterable[float], unit: float) -> int | None:
    """How closely a box, whose numbers may be rounded, agrees with an exact one.

    Args:
        box: the box as a format has it.
        other: the exact box in the same layout.
        unit: unit to which the numbers of ``box`` are rounded (`rounding_unit`); 0 if they are not.

    Returns:
        0 if the boxes are equal up to float32 errors, 1 if rounding the exact one gives ``box``, 2 if that takes
        rounding some of its numbers down, None otherwise.
    """
    level = 0
    for rounded, exact in zip(box, other, strict=True):
        difference, tolerance = abs(rounded - exact), _FLOAT32_TOLERANCE * max(1.0, abs(exact))
        if difference <= tolerance:
            continue
        if difference <= unit / 2 + tolerance:
            level = max(level, 1)
        elif 0 < exact - rounded < unit:
            level = 2
        else:
            return None
    return level
