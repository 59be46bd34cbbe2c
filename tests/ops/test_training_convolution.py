"""3x3 convolutions with gradients against PyTorch in float64, and the cases that are left to PyTorch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.detector.conv2d import Conv2d
from refdet.ops.convolution import conv3x3_weight_gradient, has_kernels
from refdet.ops.training_convolution import conv2d

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not has_kernels(CPU), reason="the kernels are not built, or there is no AVX2")
ONE = (1, 1)


def random_example(
    images: int, inputs: int, outputs: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weights that keep its standard deviation, bias, and gradient of the output."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(images, inputs, height, width, generator=random).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3, generator=random) / (9 * inputs) ** 0.5
    return (
        x,
        weight,
        torch.randn(outputs, generator=random),
        torch.randn(images, outputs, height, width, generator=random),
    )


def output_and_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor, ours: bool) -> list[Tensor]:
    """By `conv2d`, which must use the kernels, or by PyTorch."""
    given = [each.detach().requires_grad_() for each in (x, weight, *(() if bias is None else (bias,)))]
    convolve = conv2d if ours else F.conv2d
    y = convolve(*given[:2], given[2] if bias is not None else None, ONE, ONE)
    assert ("_Convolution" in type(y.grad_fn).__name__) == ours
    return [y, *torch.autograd.grad(y, given, gradient)]


@needs_kernels
@pytest.mark.parametrize(
    "shape",
    [
        (70, 64, 64, 3, 4),
        (5, 64, 96, 14, 14),
        (1, 128, 64, 37, 42),
        (2, 64, 64, 1, 130),
        (130, 64, 64, 1, 1),
        (3, 64, 80, 49, 52),  # several chunks of tiles, which start within an image; the last is smaller
    ],
    ids=str,
)
def test_outputs_and_gradients_are_close_to_float64(shape: tuple[int, int, int, int, int]) -> None:
    given = random_example(*shape)
    found = output_and_gradients(*given, ours=True)
    expected = output_and_gradients(*(each.double() for each in given), ours=False)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).abs().max() < 1e-4 * exact.std()
    torch.testing.assert_close(found[0], found[0].contiguous(memory_format=torch.channels_last), rtol=0, atol=0)


@needs_kernels
def test_results_without_a_bias_are_equal_in_both_memory_layouts() -> None:
    x, weight, _, gradient = random_example(6, 64, 64, 14, 14)
    found = output_and_gradients(x, weight, None, gradient, ours=True)
    again = output_and_gradients(
        x.contiguous(), weight.to(memory_format=torch.channels_last), None, gradient, ours=True
    )
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@needs_kernels
@pytest.mark.parametrize(
    ("x", "gradient", "message"),
    [
        (torch.zeros(2, 64, 5, 5), torch.zeros(2, 64, 5, 6), "is not that of an input"),
        (torch.zeros(2, 64, 5, 5), torch.zeros(64, 5, 5), "is not that of an input"),
        (torch.zeros(2, 64, 5, 5, dtype=torch.float64), torch.zeros(2, 64, 5, 5), "must be float32"),
        (torch.zeros(2, 60, 5, 5), torch.zeros(2, 64, 5, 5), "multiples of 16"),
    ],
)
def test_the_weight_gradient_kernel_refuses_invalid_inputs(x: Tensor, gradient: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        conv3x3_weight_gradient(x, gradient)


@needs_kernels
def test_the_weight_gradient_of_no_images_is_0() -> None:
    assert not conv3x3_weight_gradient(torch.zeros(0, 64, 5, 5), torch.zeros(0, 96, 5, 5)).any()


@needs_kernels
def test_only_requested_gradients_are_computed() -> None:
    x, weight, bias, gradient = random_example(6, 64, 64, 14, 14)
    conv2d(x, weight.requires_grad_(), bias, ONE, ONE).backward(gradient)
    assert x.grad is None and bias.grad is None and weight.grad is not None and weight.grad.any()


@pytest.mark.parametrize("how", ["no gradient", "float64", "bfloat16", "few channels", "small", "stride", "1x1", "odd"])
def test_unsupported_convolutions_are_left_to_pytorch(how: str) -> None:
    sizes = {"few channels": (6, 32, 64, 14, 14), "small": (2, 64, 64, 4, 4), "odd": (6, 64, 72, 14, 14)}
    x, weight, bias, _ = random_example(*sizes.get(how, (6, 64, 64, 14, 14)))
    if how == "1x1":
        weight = weight[:, :, :1, :1]
    if how == "float64":
        x, weight, bias = x.double(), weight.double(), bias.double()
    stride, padding = (2, 2) if how == "stride" else ONE, (0, 0) if how == "1x1" else ONE
    with torch.set_grad_enabled(how != "no gradient"), torch.autocast("cpu", enabled=how == "bfloat16"):
        found = conv2d(x, weight.requires_grad_(), bias, stride, padding)
        assert torch.equal(found, F.conv2d(x, weight, bias, stride, padding))
    assert "_Convolution" not in type(found.grad_fn).__name__


@pytest.mark.parametrize("inputs", [1, 3, 8, 15, 16, 24])
@pytest.mark.parametrize("stride", [(2, 2), (2, 1), (1, 3)])
def test_strided_pointwise_convolutions_of_few_channels(inputs: int, stride: tuple[int, int]) -> None:
    """PyTorch may crash on these in channels_last with fewer than 16 channels."""
    x, _, bias, _ = random_example(8, inputs, 16, 44, 52)
    weight = torch.randn(16, inputs, 1, 1).to(memory_format=torch.channels_last)
    given = [each.detach().requires_grad_() for each in (x, weight, bias)]
    y = conv2d(*given, stride, (0, 0))
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gradient = gradient.to(memory_format=torch.channels_last)
    exact = [each.detach().double().contiguous().requires_grad_() for each in (x, weight, bias)]
    expected = F.conv2d(*exact, stride)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    found_gradients = torch.autograd.grad(y, given, gradient)
    exact_gradients = torch.autograd.grad(expected, exact, gradient.double())
    for found, exact_gradient in zip(found_gradients, exact_gradients, strict=True):
        torch.testing.assert_close(found.double(), exact_gradient, atol=1e-3, rtol=1e-4)


def test_conv2d_layer_equals_torch_nn_conv2d() -> None:
    ours, theirs = Conv2d(64, 64, 3, padding=1), torch.nn.Conv2d(64, 64, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 64, 14, 14)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
