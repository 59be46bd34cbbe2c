"""Bias, shortcut and ReLU in one fused pass, with gradients, against separate operators."""

from __future__ import annotations

import pytest
import torch
from devices import GPU
from torch import Tensor
from torch.nn import functional as F

from refdet.ops import training_epilogue
from refdet.ops.scaled_weight import scaled_weight
from refdet.ops.training_epilogue import _BiasRelu, bias_relu, compute_dtype, is_fused_faster

HALF = (torch.bfloat16, torch.float16)
with_shortcut = pytest.mark.parametrize("with_shortcut", [False, True])


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse on the CPU too, where the fused pass is plain PyTorch."""
    monkeypatch.setattr(training_epilogue, "FUSED", frozenset(("cpu", "cuda")))


def random_leaf(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """A random leaf that requires gradients, channels_last if it has four axes; equal on all devices."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    x = x.to(device, dtype)
    return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()


def separate_operators(x: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    y = x + bias.to(x.dtype)[:, None, None]
    return torch.relu(y if shortcut is None else y + shortcut)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("trained_bias", [False, True])
@with_shortcut
def test_fused_pass_equals_separate_operators_and_passes_gradcheck(
    channels_last: bool, trained_bias: bool, with_shortcut: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    given = [random_leaf(*shape, dtype=torch.float64) for shape in ((2, 3, 4, 5), (3,), (2, 3, 5, 4))]
    x, bias = given[0], given[1].requires_grad_(trained_bias)
    shortcut = given[2].detach().transpose(2, 3).requires_grad_() if with_shortcut else None

    def compute(x: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
        return _BiasRelu.apply(x.clone(memory_format=layout), bias, shortcut)

    torch.testing.assert_close(compute(x, bias, shortcut), separate_operators(x, bias, shortcut), rtol=0, atol=0)
    assert torch.autograd.gradcheck(compute, (x, bias, shortcut))


@pytest.mark.parametrize(
    ("dtype", "shortcut_dtype", "layout", "supported"),
    [(torch.float32, None, torch.channels_last, True), (torch.float32, torch.float32, torch.channels_last, True),
     (torch.bfloat16, None, torch.channels_last, True), (torch.bfloat16, torch.bfloat16, torch.channels_last, True),
     (torch.bfloat16, torch.float32, torch.channels_last, False), (torch.float32, None, torch.contiguous_format, False),
     (torch.float64, None, torch.channels_last, False), (torch.float64, torch.float64, torch.channels_last, False)],
)  # fmt: skip
def test_inputs_that_the_kernel_does_not_support_are_not_fused(
    dtype: torch.dtype, shortcut_dtype: torch.dtype | None, layout: torch.memory_format, supported: bool
) -> None:
    x, bias = random_leaf(2, 4, 3, 5, dtype=dtype), random_leaf(4)
    shortcut = None if shortcut_dtype is None else random_leaf(2, 4, 3, 5, dtype=shortcut_dtype)
    y = bias_relu(x.clone(memory_format=layout), bias, shortcut)
    assert ("_BiasRelu" in type(y.grad_fn).__name__) == supported
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(y, separate_operators(x, bias, shortcut).to(dtype), **close)
    y.sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32


def test_bias_relu_is_in_place_and_saves_only_its_output() -> None:
    convolved = F.conv2d(random_leaf(2, 4, 5, 5), random_leaf(6, 4, 3, 3))
    y = bias_relu(convolved, random_leaf(6).detach())
    assert y is convolved
    assert [saved.data_ptr() for saved in y.grad_fn.saved_tensors] == [y.data_ptr()]  # type: ignore[union-attr]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nan_is_kept_in_output_and_gradient() -> None:
    x = random_leaf(1, 2, 1, 3)
    with torch.no_grad():
        x[0, 0, 0, 1] = torch.nan
    y = bias_relu(x.clone(), random_leaf(2).detach())
    assert y.isnan().sum() == 1
    y.backward(torch.full_like(y, torch.nan))
    assert x.grad is not None and bool(x.grad[0, 0, 0, 1].isnan())


def test_a_sum_of_bfloat16_is_rounded_once() -> None:
    x, bias = random_leaf(4, 64, 9, 9, dtype=torch.bfloat16), random_leaf(64)
    shortcut = x.detach().flip(0, 2, 3)
    exact = separate_operators(x.double(), bias, shortcut.double())
    rounded = bias_relu(x.clone(), bias, shortcut)
    assert torch.equal(rounded, exact.float().bfloat16())
    errors = [(y.double() - exact).abs().mean() for y in (rounded, separate_operators(x, bias, shortcut))]
    assert errors[0] < 0.9 * errors[1]


def test_fusion_needs_gradients_and_computes_in_the_dtype_of_autocast() -> None:
    cpu = torch.device("cpu")
    assert is_fused_faster(cpu) and not is_fused_faster(torch.device("meta"))
    with torch.no_grad():
        assert not is_fused_faster(cpu)
    assert compute_dtype(cpu, torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = [compute_dtype(cpu, dtype) for dtype in (torch.float32, torch.float64, torch.float16)]
    assert found == [torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_scaled_weight_equals_the_product_bit_for_bit(dtype: torch.dtype) -> None:
    weight, scale = random_leaf(8, 4, 3, 3), random_leaf(8).detach()[:, None, None, None]
    found, expected = scaled_weight(weight, scale, dtype), (weight * scale).to(dtype)
    assert torch.equal(found, expected) and found.dtype == dtype and found.stride() == weight.stride()
    gradient = random_leaf(8, 4, 3, 3, dtype=dtype).detach()
    gradients = [torch.autograd.grad(y, weight, gradient)[0] for y in (found, expected)]
    assert torch.equal(*gradients) and gradients[0].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(kernels=True))])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(64, 14), (6, 5), (300, 1)])
@with_shortcut
def test_a_convolution_with_the_fused_pass(
    device: str, bf16: bool, channels: int, size: int, with_shortcut: bool
) -> None:
    """In bfloat16, rounding makes some activations positive in only one of the two."""
    given = [
        random_leaf(3, 8, size, size),
        random_leaf(channels, 8, 3, 3),
        random_leaf(channels),
        random_leaf(4, channels, size, size)[1:],
    ]
    gradient = random_leaf(5, channels, size, size).detach()[2:]

    def run(fused: bool) -> list[Tensor]:
        x, weight, bias, shortcut = (each.detach().to(device).requires_grad_() for each in given)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y = F.conv2d(x, weight, None, padding=1)
            added = shortcut.to(y.dtype) if with_shortcut else None
            y = bias_relu(y, bias, added) if fused else separate_operators(y, bias, added)
        inputs = [x, weight, bias, *([shortcut] if with_shortcut else [])]
        return [y.detach().float(), *torch.autograd.grad(y, inputs, gradient.to(device, y.dtype))]

    fused_results, separate_results = run(True), run(False)
    assert bf16 or torch.equal(fused_results[0], separate_results[0])
    for found, expected in zip(fused_results, separate_results, strict=True):
        assert float((found - expected).norm()) <= (0.1 if bf16 else 1e-5) * float(expected.norm())


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_torch_compile_keeps_one_graph(device: str) -> None:
    shapes = ((2, 4, 5, 5), (6, 4, 3, 3), (6,))
    x, weight, bias = (random_leaf(*shape).detach().to(device) for shape in shapes)
    scale = random_leaf(6).detach().to(device)[:, None, None, None]
    weight.requires_grad_()

    def compute(weight: Tensor) -> Tensor:
        y = F.conv2d(x.bfloat16(), scaled_weight(weight, scale, torch.bfloat16))
        return bias_relu(y, bias).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(f(weight), weight)[0] for f in (compute, compiled)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
