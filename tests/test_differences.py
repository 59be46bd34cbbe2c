"""`benchmarks/differences.py`: `row_difference` tolerates float32 rounding, but no faults or TF32; NaN is kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from benchmark_modules import benchmark_module
from torch import Tensor
from torch.nn import functional as F

differences = benchmark_module("differences")


def random_channels() -> Tensor:
    """Channels (N, H, W) after a ReLU; the first is all zero, the second nearly."""
    values = torch.randn(32, 6, 8, generator=torch.Generator().manual_seed(0)).relu()
    values[0], values[1] = 0, values[1] * 0.01
    return values


def test_rounding_in_a_row_of_zeros_is_tolerated() -> None:
    wanted = random_channels()
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    errors = (wanted + 1e-6 * noise - wanted).flatten(1).norm(dim=1)
    assert errors[1] > 1e-4 * wanted[1].norm()  # large relative to the norm of the weak channel
    assert 0 < differences.row_difference(wanted + 1e-6 * noise, wanted) < 1e-5


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda x: x.roll(1, 0), id="channels shifted"),
        pytest.param(lambda x: x.roll(1, 2), id="columns shifted"),
        pytest.param(lambda x: x * 1.001, id="scaled"),
        pytest.param(lambda x: x.index_fill(0, torch.tensor(1), 0), id="weak channel lost"),
        pytest.param(lambda x: x + (torch.arange(x.numel()) == 5).reshape(x.shape) * 0.01, id="one value of channel 0"),
        pytest.param(lambda x: x.index_fill(0, torch.tensor(3), math.nan), id="NaN"),
    ],
)
def test_a_fault_exceeds_the_tolerance_of_rounding(fault: Callable[[Tensor], Tensor]) -> None:
    wanted = random_channels()
    assert not differences.row_difference(fault(wanted), wanted) <= 1e-4


def test_empty_and_zero_tensors_have_no_difference() -> None:
    assert differences.row_difference(torch.zeros(0, 4), torch.zeros(0, 4)) == 0
    assert differences.row_difference(torch.zeros(2, 4), torch.zeros(2, 4)) == 0


@pytest.mark.parametrize("place", range(3))
def test_nan_among_differences_is_never_skipped(place: int) -> None:
    values = [1e-6, 2e-6]
    assert differences.largest(values) == 2e-6 and differences.largest([]) == 0
    values.insert(place, math.nan)
    assert math.isnan(differences.largest(values))


def round_to_tf32(x: Tensor) -> Tensor:
    """Round float32 values to the 10 bits of TF32's mantissa."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def convolve(x: Tensor, round_input: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Twelve random convolutions with ReLU in the dtype of x; a function rounds their inputs and weights."""
    random = torch.Generator().manual_seed(0)
    for _ in range(12):
        weight = torch.randn(24, 24, 3, 3, generator=random) * (2 / 216) ** 0.5
        x = F.conv2d(round_input(x), round_input(weight.to(x.dtype)), padding=1).relu()
    return x


def test_the_tolerance_of_twelve_convolutions_separates_float32_from_tf32() -> None:
    x = torch.randn(1, 24, 20, 20, generator=torch.Generator().manual_seed(1))
    exact = convolve(x.double())

    def error(found: Tensor) -> float:
        return float((found.double() - exact).abs().max() / exact.max())

    assert 0 < error(convolve(x)) < 1e-5
    assert error(convolve(x.contiguous(memory_format=torch.channels_last))) <= 1e-5
    assert error(convolve(x, round_to_tf32)) > 1e-5
