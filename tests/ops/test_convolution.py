"""The CPU kernels for 3x3 and 1x1 convolutions against float64.

Single: float32. Half: bfloat16 tensors, multiplied in float16. The tests run both kernel sizes.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from refdet.ops.convolution import Packed, conv1x1, conv3x3, has_kernels, pack_conv1x1, pack_conv3x3

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_kernels(CPU), reason="the kernels are not built, or the processor has no AVX2")
SINGLE = pytest.param(False, id="single")
HALF = pytest.param(True, id="half", marks=pytest.mark.skipif(not has_kernels(CPU, half=True), reason="no AVX512-FP16"))
KINDS = [(side, half) for side in (1, 3) for half in (False, True) if not half or has_kernels(CPU, half=True)]

# by `half`, for outputs of standard deviation 1 and up to 512 input channels: over twice the largest error measured
TOLERANCE = {False: 1e-4, True: 0.2}


class Example(NamedTuple):
    """The arguments of one convolution: a channels_last input, weights that keep its standard deviation, and a bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def half(self) -> bool:
        return self.x.dtype == torch.bfloat16

    def packed(self) -> Packed:
        """The weights in the layout of the kernel."""
        if self.weight.shape[-1] == 1:
            return pack_conv1x1(self.weight.flatten(1), self.half)
        return pack_conv3x3(self.weight, self.half)

    def run(self, x: Tensor | None = None, **options: bool | Tensor) -> Tensor:
        """The output of the kernel, for another input if ``x`` is given."""
        kernel = conv1x1 if self.weight.shape[-1] == 1 else conv3x3
        return kernel(self.x if x is None else x, self.packed(), self.bias, **options)  # type: ignore[arg-type]

    def exact(self, x: Tensor | None = None) -> Tensor:
        """The output of PyTorch in float64, for another input if ``x`` is given."""
        kernel_size = self.weight.shape[-1]
        x = (self.x if x is None else x).double()
        return F.conv2d(x, self.weight.double(), self.bias.double(), padding=kernel_size // 2)


def random_example(
    kernel_size: int, half: bool, images: int, inputs: int, outputs: int, height: int, width: int, seed: int = 0
) -> Example:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(images, inputs, height, width, generator=random).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, kernel_size, kernel_size, generator=random) / (kernel_size**2 * inputs) ** 0.5
    return Example(x.bfloat16() if half else x, weight, torch.randn(outputs, generator=random))


@given(
    kind=st.sampled_from(KINDS),
    images=st.integers(1, 3),
    inputs=st.sampled_from((16, 48, 272)),
    outputs=st.sampled_from((64, 128)),
    extra_outputs=st.sampled_from((0, 16, 48)),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_any_size_is_close_to_float64(
    kind: tuple[int, bool], images: int, inputs: int, outputs: int, extra_outputs: int, height: int, width: int,
    seed: int,
) -> None:  # fmt: skip
    kernel_size, half = kind
    outputs += 0 if half else extra_outputs  # half needs a multiple of 64
    example = random_example(kernel_size, half, images, inputs, outputs, height, width, seed)
    found = example.run()
    assert found.shape == (images, outputs, height, width) and found.dtype == example.x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), example.exact(), rtol=0, atol=TOLERANCE[half])


# kernel_size, and images, input channels, output channels, height and width
SIZES = [
    (3, (2, 512, 512, 7, 7)), (3, (1, 1024, 512, 38, 50)), (3, (70, 64, 64, 7, 7)),
    (1, (2, 2048, 512, 7, 7)), (1, (1, 1024, 2560, 38, 50)), (1, (1, 64, 256, 75, 100)),
]  # fmt: skip


@pytest.mark.parametrize(("kernel_size", "shape"), SIZES)
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_errors_are_small_at_sizes_of_the_detector(kernel_size: int, shape: tuple[int, ...], half: bool) -> None:
    example = random_example(kernel_size, half, *shape)
    error = example.run().double() - example.exact()
    rms_limit, max_limit = (1e-2, 0.08) if half else (5e-6, 5e-5)
    assert float(error.square().mean().sqrt()) < rms_limit
    assert float(error.abs().max()) < max_limit


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_half_is_about_as_accurate_as_pytorch_in_bfloat16(kernel_size: int) -> None:
    """On an input after a ReLU. The error of the 3x3 kernel is about 3 times that of PyTorch."""
    if not has_kernels(CPU, half=True):
        pytest.skip("no AVX512-FP16")
    x, weight, _ = random_example(kernel_size, True, 4, 512, 128, 7, 7)
    example = Example(x.relu(), weight.bfloat16().float(), torch.zeros(128))
    outputs = (example.run(), F.conv2d(example.x, weight.bfloat16(), padding=kernel_size // 2))
    ours, theirs = ((y.double() - example.exact()).square().mean().sqrt() for y in outputs)
    assert ours < (1.3 if kernel_size == 1 else 4) * theirs


@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e-4, 1e4, 1e10, 1e30, 1e35])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_no_magnitude_overflows_or_vanishes(kernel_size: int, half: bool, magnitude: float) -> None:
    """Scales the whole input, then all weights, then one image and the weights of one output channel."""
    example = random_example(kernel_size, half, 2, 256, 64, 7, 8)
    zero = torch.zeros(64)
    expected = Example(example.x, example.weight, zero).exact()
    for x, weight in ((example.x * magnitude, example.weight), (example.x, example.weight * magnitude)):
        found = Example(x, weight, zero).run().double() / magnitude
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[half])
    x, weight = example.x.clone(), example.weight.clone()
    x[1], weight[5] = x[1] * magnitude, weight[5] * magnitude
    found = Example(x, weight, zero).run().double()
    scale = torch.ones(2, 64, 1, 1, dtype=torch.float64)
    scale[1] *= magnitude
    scale[:, 5] *= magnitude
    representable = (scale < 1e38) & (scale > 1e-38)  # in float32 and bfloat16
    close = torch.isclose(found / scale, expected, rtol=0, atol=TOLERANCE[half])
    assert bool((close | ~representable).all())


@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_huge_inputs_times_zero_weights_are_zero(half: bool) -> None:
    """And zero inputs times huge weights: the product of their scales overflows float32, but the sums are 0."""
    for kernel_size in (1, 3):
        x, weight, bias = random_example(kernel_size, half, 1, 16, 64, 7, 7)
        x, weight = torch.zeros_like(x), torch.zeros_like(weight)
        x[:, 0], weight[:, 1] = 1e30, 1e30
        assert torch.equal(Example(x, weight, bias).run(), bias.to(x.dtype)[None, :, None, None].expand(1, 64, 7, 7))


@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_sums_of_equal_products_do_not_overflow(half: bool) -> None:
    """All products are equal, so that the sums are as large as they can be."""
    for kernel_size in (1, 3):
        x = torch.full((1, 1024, 7, 7), 3.0, dtype=torch.bfloat16 if half else torch.float32)
        example = Example(x, torch.full((64, 1024, kernel_size, kernel_size), 2.0), torch.zeros(64))
        torch.testing.assert_close(example.run().double(), example.exact(), rtol=4e-2, atol=0)


@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_a_3x3_filter_with_one_nonzero_weight_shifts_the_input(half: bool) -> None:
    x, weight, bias = random_example(3, half, 1, 64, 64, 9, 10)
    for row, column in ((0, 0), (0, 2), (1, 1), (2, 1)):
        weight.zero_()
        weight[:, :, row, column] = torch.eye(64)
        shifted = F.pad(x, (1, 1, 1, 1))[:, :, row : row + 9, column : column + 10]
        found = Example(x, weight, bias * 0).run()
        torch.testing.assert_close(found, shifted, rtol=0, atol=0.1 if half else 1e-5)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_shortcut_and_relu(kernel_size: int, half: bool) -> None:
    example = random_example(kernel_size, half, 3, 64, 128, 6, 5)
    plain = example.run()
    assert bool((plain < 0).any())
    assert torch.equal(example.run(relu=True), plain.relu())
    if kernel_size == 1:
        shortcut = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(plain.dtype)
        wide = torch.cat((shortcut, shortcut), 1).to(memory_format=torch.channels_last)
        expected = example.exact() + shortcut.double()
        for other in (shortcut, wide[:, 128:], shortcut.transpose(2, 3).contiguous().transpose(2, 3)):
            found = example.run(shortcut=other)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[half])
            assert torch.equal(example.run(shortcut=other, relu=True), found.relu())


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_results_do_not_depend_on_the_batch_or_the_number_of_threads(kernel_size: int, half: bool) -> None:
    example = random_example(kernel_size, half, 37, 320, 64, 7, 7)
    x, packed, together = example.x, example.packed(), example.run()
    for part in (slice(0, 1), slice(5, 20), slice(36, 37)):
        assert torch.equal(example.run(x[part]), together[part])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(example.run(), together)
            assert all(torch.equal(*both) for both in zip(example.packed(), packed, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_any_memory_layout_gives_the_same_result(kernel_size: int, half: bool) -> None:
    example = random_example(kernel_size, half, 2, 32, 64, 6, 5)
    x, packed, expected = example.x, example.packed(), example.run()
    wide = torch.randn(2, 96, 6, 5).to(x.dtype).to(memory_format=torch.channels_last)
    wide[:, 32:64] = x
    large = torch.randn(2, 32, 8, 9).to(x.dtype).to(memory_format=torch.channels_last)
    large[:, :, 1:7, 2:7] = x
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)  # columns before rows
    for other in (x.contiguous(), wide[:, 32:64], large[:, :, 1:7, 2:7], swapped):
        assert other.stride() != x.stride()
        assert torch.equal(example.run(other), expected)
    weight = example.weight.to(memory_format=torch.channels_last)
    assert all(torch.equal(*both) for both in zip(example._replace(weight=weight).packed(), packed, strict=True))
    bias = torch.stack((example.bias, example.bias), 1)[:, 0]
    assert torch.equal(example._replace(bias=bias).run(), expected)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 1), (1, 5)])
def test_inputs_with_a_side_of_one_may_have_any_stride_there(kernel_size: int, height: int, width: int) -> None:
    example = random_example(kernel_size, False, 1, 16, 16, 1, 1)
    large = torch.randn(3, 32, 2 * height, 2 * width).to(memory_format=torch.channels_last)
    rows = torch.randn(3, height * width, 16)
    for view in (
        large[:, :16, ::2, ::2],
        large[:, 16:, :height, :width],
        large[::2, :16, :height, :width],
        rows.transpose(1, 2).unflatten(2, (height, width)),
        rows[:, :1].transpose(1, 2).unsqueeze(-1),
    ):
        torch.testing.assert_close(example.run(view).double(), example.exact(view), rtol=0, atol=TOLERANCE[False])


@pytest.mark.parametrize("shape", [(0, 16, 7, 7), (2, 16, 0, 7), (2, 16, 7, 0)])
def test_empty_inputs_give_empty_outputs(shape: tuple[int, ...]) -> None:
    for kernel_size in (1, 3):
        found = Example(torch.zeros(shape), torch.ones(32, 16, kernel_size, kernel_size), torch.zeros(32)).run()
        assert found.shape == (shape[0], 32, *shape[2:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_nan_and_inf_reach_the_output_of_their_own_image_only(kernel_size: int, half: bool, value: float) -> None:
    example = random_example(kernel_size, half, 3, 16, 64, 7, 7)
    clean = example.run()
    example.x[1, 3, 2, 2] = value
    for relu in (False, True):
        found = example.run(relu=relu)
        for other in (0, 2):
            assert torch.equal(found[other], clean[other].relu() if relu else clean[other])
        if not relu or value != value:  # ReLU turns -inf into 0
            assert not bool(found[1, :, 2, 2].isfinite().any())


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((1, 32, 7, 7), None, (16,), "the map must be"),
        ((16, 7, 7), None, (16,), "the map must be"),
        ((1, 16, 7, 7), (16, 16, 3, 3), (16,), "not one of pack_conv"),
        ((1, 16, 7, 7), None, (17,), "the bias must be"),
    ],
)
def test_shapes_that_do_not_match_are_refused(
    kernel_size: int, x: tuple[int, ...], weight: tuple[int, ...] | None, bias: tuple[int, ...], message: str
) -> None:
    kernel = conv1x1 if kernel_size == 1 else conv3x3
    packed = Example(torch.ones(1), torch.ones(16, 16, kernel_size, kernel_size), torch.ones(16)).packed()
    if weight is not None:
        packed = packed._replace(weight=torch.ones(weight))
    with pytest.raises(RuntimeError, match=message):
        kernel(torch.ones(x), packed, torch.ones(bias))


def test_a_scale_or_shortcut_of_another_shape_is_refused() -> None:
    example = random_example(1, False, 1, 16, 16, 7, 7)
    packed = example.packed()
    with pytest.raises(RuntimeError, match="the scale must be"):
        conv1x1(example.x, packed._replace(scale=torch.ones(17)), example.bias)
    for shortcut in (torch.ones(1, 16, 7, 6), torch.ones(1, 16, 7, 7).double()):
        with pytest.raises(RuntimeError, match="the shortcut must be"):
            conv1x1(example.x, packed, example.bias, shortcut)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_other_types_are_refused(kernel_size: int, half: bool) -> None:
    example = random_example(kernel_size, half, 1, 16, 64, 7, 7)
    accepted = torch.bfloat16 if half else torch.float32
    for dtype in {torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.int64} - {accepted}:
        with pytest.raises(RuntimeError, match="must be bfloat16" if half else "must be float32"):
            example.run(torch.ones(1, 16, 7, 7, dtype=dtype))
    with pytest.raises(RuntimeError, match="must be float32"):
        example._replace(weight=example.weight.double()).packed()


@pytest.mark.parametrize("shape", [(16, 16, 1, 1), (24, 16, 3, 3), (16, 8, 3, 3), (0, 16, 3, 3), (16, 3, 3)])
def test_invalid_3x3_weights_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="^conv3x3: (the weight|output channels) must be"):
        pack_conv3x3(torch.ones(shape))


@pytest.mark.parametrize("shape", [(16, 16, 1, 1), (24, 16), (16, 8), (0, 16), (16,)])
def test_invalid_1x1_weights_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="^conv1x1: (the weight|output channels) must be"):
        pack_conv1x1(torch.ones(shape))


@pytest.mark.parametrize("half", [HALF])
def test_half_needs_a_multiple_of_64_output_channels(half: bool) -> None:
    for pack, shape in ((pack_conv1x1, (80, 16)), (pack_conv3x3, (80, 16, 3, 3))):
        with pytest.raises(RuntimeError, match="multiple of 64"):
            pack(torch.ones(shape), half)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("half", [SINGLE, HALF])
def test_operators_pass_opcheck(kernel_size: int, half: bool) -> None:
    example = random_example(kernel_size, half, 2, 16, 64, 5, 6)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.refdet
    packed = example.packed()
    if kernel_size == 1:
        torch.library.opcheck(ops.pack_conv1x1, (example.weight.flatten(1), half), test_utils=checks)
        for options in ((), (example.run(), True)):  # the second: shortcut and ReLU
            torch.library.opcheck(ops.conv1x1, (example.x, *packed, example.bias, *options), test_utils=checks)
    else:
        torch.library.opcheck(ops.pack_conv3x3, (example.weight, half), test_utils=checks)
        torch.library.opcheck(ops.conv3x3, (example.x, *packed, example.bias, True), test_utils=checks)
