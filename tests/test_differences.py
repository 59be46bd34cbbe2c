"""How computations of the same are compared: rounding passes, faults and rougher arithmetic do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from benchmark_modules import benchmark_module
from torch import Tensor
from torch.nn import functional as F

differences = benchmark_module("differences")


def channels() -> Tensor:
    """Channels (N, H, W) after a ReLU; the first is all zero, the second nearly."""
    values = torch.randn(32, 6, 8, generator=torch.Generator().manual_seed(0)).relu()
    values[0], values[1] = 0, values[1] * 0.01
    return values


def test_a_row_of_zeros_may_differ_by_rounding() -> None:
    wanted = channels()
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    rows = (wanted + 1e-6 * noise - wanted).flatten(1).norm(dim=1)
    assert rows[1] > 1e-4 * wanted[1].norm()  # of its own norm it is much
    assert 0 < differences.row_difference(wanted + 1e-6 * noise, wanted) < 1e-5


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.roll(1, 0),
        lambda x: x.roll(1, 2),
        lambda x: x * 1.001,
        lambda x: torch.where(torch.arange(len(x))[:, None, None] == 1, 0.0, x),  # only the weak channel
        lambda x: x + (torch.arange(x.numel()) == 5).reshape(x.shape) * 0.01,  # one number of the channel of zeros
        lambda x: x.clone().index_fill_(0, torch.tensor([3]), math.nan),
    ],
)
def test_a_fault_shows(fault: Callable[[Tensor], Tensor]) -> None:
    wanted = channels()
    assert not differences.row_difference(fault(wanted), wanted) <= 1e-4


def test_no_rows_do_not_differ() -> None:
    assert differences.row_difference(torch.zeros(0, 4), torch.zeros(0, 4)) == 0
    assert differences.row_difference(torch.zeros(2, 4), torch.zeros(2, 4)) == 0


def tf32(x: Tensor) -> Tensor:
    """Rounded to the 10 bits of TF32's mantissa."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def layers(x: Tensor, rounded: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Twelve convolutions with ReLU in the dtype of x, with rounded inputs."""
    random = torch.Generator().manual_seed(0)
    for _ in range(12):
        weight = torch.randn(24, 24, 3, 3, generator=random) * (2 / 216) ** 0.5
        x = F.conv2d(rounded(x), rounded(weight.to(x.dtype)), padding=1).relu()
    return x


def test_float32_has_float32s_error_and_tf32_has_not() -> None:
    x = torch.randn(1, 24, 20, 20, generator=torch.Generator().manual_seed(1))
    exact = layers(x.double())

    def error(found: Tensor) -> float:
        return float((found.double() - exact).abs().max() / exact.max())

    own = error(layers(x))
    assert 0 < own < 1e-5
    assert error(layers(x.contiguous(memory_format=torch.channels_last))) <= 1e-5
    assert error(layers(x, tf32)) > 1e-5
