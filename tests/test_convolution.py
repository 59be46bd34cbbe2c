"""The kernel for 3x3 convolutions beside float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from refdet.ops import convolution
from refdet.ops.convolution import WinogradConv2d, conv3x3, has_conv3x3, pack_conv3x3

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_conv3x3(CPU), reason="the kernel is not built, or the processor has no AVX2")

# of a result of a standard deviation of 1, with up to 512 channels: five times what was seen
TOLERANCE = 1e-4


def drawn(images: int, inputs: int, outputs: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, ...]:
    """A map in channels_last, weights that keep its deviation, and a bias."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(images, inputs, height, width, generator=random).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3, generator=random) / (9 * inputs) ** 0.5
    return x, weight, torch.randn(outputs, generator=random)


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


@given(
    images=st.integers(1, 3),
    inputs=st.sampled_from((16, 48, 272)),
    outputs=st.sampled_from((16, 80)),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_size_beside_float64(images: int, inputs: int, outputs: int, height: int, width: int, seed: int) -> None:
    x, weight, bias = drawn(images, inputs, outputs, height, width, seed)
    found = conv3x3(x, pack_conv3x3(weight), bias)
    assert found.shape == (images, outputs, height, width)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), exact(x, weight, bias), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [(2, 512, 512, 7, 7), (1, 1024, 512, 38, 50), (70, 64, 64, 7, 7)])
def test_sizes_of_the_detector(size: tuple[int, ...]) -> None:
    x, weight, bias = drawn(*size)
    error = conv3x3(x, pack_conv3x3(weight), bias).double() - exact(x, weight, bias)
    assert float(error.square().mean().sqrt()) < 5e-6
    assert float(error.abs().max()) < 5e-5


def test_a_single_weight_moves_the_map() -> None:
    x, weight, bias = drawn(1, 16, 16, 9, 10)
    for row, column in ((0, 0), (0, 2), (1, 1), (2, 1)):
        weight.zero_()
        weight[:, :, row, column] = torch.eye(16)
        moved = F.pad(x, (1, 1, 1, 1))[:, :, row : row + 9, column : column + 10]
        torch.testing.assert_close(conv3x3(x, pack_conv3x3(weight), bias * 0), moved, rtol=0, atol=1e-5)


def test_the_same_bits_in_any_company_and_with_any_threads() -> None:
    x, weight, bias = drawn(37, 64, 48, 7, 7)
    packed = pack_conv3x3(weight)
    together = conv3x3(x, packed, bias)
    for part in (x[:1], x[5:20], x[36:]):
        first = int((x == part[0]).all(dim=(1, 2, 3)).nonzero()[0])
        assert torch.equal(conv3x3(part, packed, bias), together[first : first + len(part)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(conv3x3(x, packed, bias), together)
            assert torch.equal(pack_conv3x3(weight), packed)
    finally:
        torch.set_num_threads(threads)


def test_any_layout_of_the_map() -> None:
    x, weight, bias = drawn(2, 32, 16, 6, 5)
    packed = pack_conv3x3(weight)
    wanted = conv3x3(x, packed, bias)
    wide = torch.randn(2, 96, 6, 5).to(memory_format=torch.channels_last)
    wide[:, 32:64] = x
    large = torch.randn(2, 32, 8, 9).to(memory_format=torch.channels_last)
    large[:, :, 1:7, 2:7] = x
    for other in (x.contiguous(), wide[:, 32:64], large[:, :, 1:7, 2:7], x.flip(3).flip(3), x.transpose(2, 3).mT):
        assert torch.equal(conv3x3(other, packed, bias), wanted)
    weights = weight.to(memory_format=torch.channels_last)
    assert torch.equal(pack_conv3x3(weights), packed)
    assert torch.equal(conv3x3(x, packed, torch.stack((bias, bias), 1)[:, 0]), wanted)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 1), (1, 5)])
def test_views_with_sides_of_one(height: int, width: int) -> None:
    """Of a side of 1 the stride may be any number."""
    _, weight, bias = drawn(1, 16, 16, 1, 1)
    packed = pack_conv3x3(weight)
    large = torch.randn(3, 32, 2 * height, 2 * width).to(memory_format=torch.channels_last)
    rows = torch.randn(3, height * width, 16)
    for view in (
        large[:, :16, ::2, ::2],
        large[:, 16:, :height, :width],
        large[::2, :16, :height, :width],
        rows.transpose(1, 2).unflatten(2, (height, width)),
        rows[:, :1].transpose(1, 2).unsqueeze(-1),
    ):
        wanted = exact(view, weight, bias)
        torch.testing.assert_close(conv3x3(view, packed, bias).double(), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 16, 7, 7), (2, 16, 0, 7), (2, 16, 7, 0)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    found = conv3x3(torch.zeros(shape), pack_conv3x3(torch.ones(32, 16, 3, 3)), torch.zeros(32))
    assert found.shape == (shape[0], 32, *shape[2:])


def test_what_is_not_finite_stays_in_its_image() -> None:
    x, weight, bias = drawn(3, 16, 16, 7, 7)
    packed = pack_conv3x3(weight)
    clean = conv3x3(x, packed, bias)
    x[1, 3, 2, 2] = torch.nan
    found = conv3x3(x, packed, bias)
    assert torch.equal(found[0], clean[0]) and torch.equal(found[2], clean[2])
    assert found[1, :, 1:4, 1:4].isnan().all()


@pytest.mark.parametrize(
    ("x", "weight", "bias", "wrong"),
    [
        ((1, 32, 7, 7), None, (16,), "the map must be"),
        ((16, 7, 7), None, (16,), "the map must be"),
        ((1, 16, 7, 7), (16, 16, 3, 3), (16,), "not one of pack_conv3x3"),
        ((1, 16, 7, 7), None, (17,), "the bias must be"),
    ],
)
def test_what_does_not_fit_is_refused(
    x: tuple[int, ...], weight: tuple[int, ...] | None, bias: tuple[int, ...], wrong: str
) -> None:
    packed = pack_conv3x3(torch.ones(16, 16, 3, 3)) if weight is None else torch.ones(weight)
    with pytest.raises(RuntimeError, match=wrong):
        conv3x3(torch.ones(x), packed, torch.ones(bias))


def test_other_types_are_refused() -> None:
    packed, bias = pack_conv3x3(torch.ones(16, 16, 3, 3)), torch.ones(16)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises(RuntimeError, match="must be float32"):
            conv3x3(torch.ones(1, 16, 7, 7, dtype=dtype), packed, bias)
    with pytest.raises(RuntimeError, match="must be float32"):
        pack_conv3x3(torch.ones(16, 16, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(16, 16, 1, 1), (24, 16, 3, 3), (16, 8, 3, 3), (0, 16, 3, 3), (16, 3, 3)])
def test_weights_it_cannot_take_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="conv3x3"):
        pack_conv3x3(torch.ones(shape))


@pytest.mark.parametrize(
    ("convolution_of", "taken"),
    [
        (lambda: nn.Conv2d(64, 128, 3, padding=1), True),
        (lambda: nn.Conv2d(64, 128, 3, padding=1, bias=False), True),
        (lambda: nn.Conv2d(64, 64, 1), False),
        (lambda: nn.Conv2d(64, 64, 3), False),
        (lambda: nn.Conv2d(64, 64, 3, stride=2, padding=1), False),
        (lambda: nn.Conv2d(64, 64, 3, padding=2, dilation=2), False),
        (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=2), False),
        (lambda: nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), False),
        (lambda: nn.Conv2d(72, 64, 3, padding=1), False),
        (lambda: nn.Conv2d(32, 64, 3, padding=1), False),  # slower than PyTorch's
        (lambda: nn.Conv2d(64, 64, 3, padding=1).double(), False),
        (lambda: nn.Conv2d(64, 64, 3, padding=1).bfloat16(), False),
        (lambda: nn.ConvTranspose2d(64, 64, 3, padding=1), False),
    ],
)
def test_the_module_takes_what_it_can_do(convolution_of, taken: bool) -> None:  # noqa: ANN001
    convolution_ = convolution_of()
    assert WinogradConv2d.takes(convolution_) == taken
    if taken:
        x = torch.randn(2, 64, 7, 9)
        torch.testing.assert_close(WinogradConv2d(convolution_)(x), convolution_(x), rtol=0, atol=TOLERANCE)


def test_without_the_kernel_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "DEVICES", frozenset())
    assert not WinogradConv2d.takes(nn.Conv2d(64, 64, 3, padding=1))


def test_the_operators_keep_what_they_promise() -> None:
    x, weight, bias = drawn(2, 16, 32, 5, 6)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.refdet.pack_conv3x3, (weight,), test_utils=checks)
    torch.library.opcheck(torch.ops.refdet.conv3x3, (x, pack_conv3x3(weight), bias), test_utils=checks)
