"""How far apart two computations of the same numbers are, and how far they may be."""

from __future__ import annotations

from torch import Tensor

# How many times the error of float32 on the CPU another float32 may have: four of its 24 bits. Winograd's algorithm
# with tiles of 4x4 outputs, which cuDNN may choose, has ten times the error of plain sums. TF32 loses thirteen bits.
FLOAT32_ERRORS = 16.0


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


def float32_limit(own: float, limit: float) -> float:
    """The error that a float32 computation may have against float64.

    A limit below a few times the error that float32 has anyway says nothing about the computation: float32 sums in any
    two orders differ by so much.

    Args:
        own: the error of float32 on the CPU against the same float64.
        limit: the error to allow where it is far above `own`.
    """
    return max(limit, FLOAT32_ERRORS * own)
