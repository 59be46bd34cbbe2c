"""How far apart two computations of the same numbers are."""

from __future__ import annotations

from torch import Tensor


def row_difference(found: Tensor, wanted: Tensor) -> float:
    """The greatest distance of a row from the wanted one, relative to its norm or, if greater, the typical norm.

    The typical norm is the root mean square over the wanted rows. A row that a ReLU leaves at zero, or nearly, has no
    scale of its own: rounding in the layers before moves it as far as any other row, which may be many times its norm.
    A row that is wrong differs by as much as its norm, so that it shows unless all of it is smaller than rounding.

    Args:
        found: rows (N, ...), such as the features of boxes, or the channels of a map.
        wanted: the same, of the computation to compare with.

    Returns:
        0 without rows; NaN if a number is NaN.
    """
    if not len(wanted):
        return 0.0
    expected = wanted.double().flatten(1)
    norms = expected.norm(dim=1)
    scale = norms.clamp(min=float(norms.square().mean().sqrt()))
    return float(((found.double().flatten(1) - expected).norm(dim=1) / scale.clamp(min=1e-30)).max())
