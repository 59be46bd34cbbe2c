"""Box layouts of the formats, to compare their boxes with COCO's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Box = tuple[float, float, float, float]


# Each of these functions converts COCO's x y w h, in pixels, to a layout; width and height are those of the image.


def _xyxy(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    return x, y, x + w, y + h


def _normalized(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    return x / width, y / height, (x + w) / width, (y + h) / height


def _padded(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    """Relative to the square of the image's longer side, in which LLaVA centers the image."""
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

_FLOAT32_TOLERANCE = 1e-6  # relative; a few units in the last place, as x + w is the sum of two rounded numbers
_MAX_DECIMALS = 6  # of numbers that are taken as rounded


def rounding_unit(numbers: Iterable[float]) -> float:
    """Return the unit of the last decimal place that any number has, such as 0.01; 0 if they are not rounded."""
    max_decimals = 0
    for number in numbers:
        mantissa, _, exponent = f"{number:.15g}".partition("e")
        decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        if decimals > _MAX_DECIMALS:
            return 0.0
        max_decimals = max(max_decimals, decimals)
    return float(10**-max_decimals)


def agreement(box: Iterable[float], other: Iterable[float], unit: float) -> int | None:
    """How closely a rounded box agrees with an exact one.

    Args:
        box: the box as a format has it.
        other: the exact box in the same layout.
        unit: unit of the last decimal place of ``box``, from `rounding_unit`.

    Returns:
        0 if the boxes are equal in float32, 1 if rounding the exact one gives ``box``, 2 if truncating some of its
        numbers does, None otherwise.
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
