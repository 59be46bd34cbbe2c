"""Bias, shortcut and ReLU in one pass, with gradients, beside the separate operators."""

from __future__ import annotations

import pytest
import torch
from devices import GPU
from torch import Tensor
from torch.nn import functional as F

from refdet.ops import training_epilogue
from refdet.ops.scaled_weight import scaled_weight
from refdet.ops.training_epilogue import _BiasRelu, bias_relu, compute_dtype, is_fused_training

HALF = (torch.bfloat16, torch.float16)
with_shortcut = pytest.mark.parametrize("with_shortcut", [False, True])


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse on CPUs too, where the pass is plain PyTorch."""
    monkeypatch.setattr(training_epilogue, "FUSED", frozenset(("cpu", "cuda")))


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """A leaf with gradients, channels_last if it has four axes; the same on every device."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    x = x.to(device, dtype)
    return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()


def separate(x: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    y = x + bias.to(x.dtype)[:, None, None]
    return torch.relu(y if shortcut is None else y + shortcut)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("trained_bias", [False, True])
@with_shortcut
def test_gradcheck(channels_last: bool, trained_bias: bool, with_shortcut: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    given = [drawn(*shape, dtype=torch.float64) for shape in ((2, 3, 4, 5), (3,), (2, 3, 5, 4))]
    x, bias = given[0], given[1].requires_grad_(trained_bias)
    shortcut = given[2].detach().transpose(2, 3).requires_grad_() if with_shortcut else None

    def compute(x: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
        return _BiasRelu.apply(x.clone(memory_format=layout), bias, shortcut)

    torch.testing.assert_close(compute(x, bias, shortcut), separate(x, bias, shortcut), rtol=0, atol=0)
    assert torch.autograd.gradcheck(compute, (x, bias, shortcut))


@pytest.mark.parametrize(
    ("dtype", "shortcut_dtype", "layout", "supported"),
    [(torch.float32, None, torch.channels_last, True), (torch.float32, torch.float32, torch.channels_last, True),
     (torch.bfloat16, None, torch.channels_last, True), (torch.bfloat16, torch.bfloat16, torch.channels_last, True),
     (torch.bfloat16, torch.float32, torch.channels_last, False), (torch.float32, None, torch.contiguous_format, False),
     (torch.float64, None, torch.channels_last, False), (torch.float64, torch.float64, torch.channels_last, False)],
)  # fmt: skip
def test_what_the_kernel_does_not_support_is_separate(
    dtype: torch.dtype, shortcut_dtype: torch.dtype | None, layout: torch.memory_format, supported: bool
) -> None:
    x, bias = drawn(2, 4, 3, 5, dtype=dtype), drawn(4)
    shortcut = None if shortcut_dtype is None else drawn(2, 4, 3, 5, dtype=shortcut_dtype)
    y = bias_relu(x.clone(memory_format=layout), bias, shortcut)
    assert ("_BiasRelu" in type(y.grad_fn).__name__) == supported
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(y, separate(x, bias, shortcut).to(dtype), **close)
    y.sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32


def test_it_is_in_place_and_keeps_only_its_output() -> None:
    convolved = F.conv2d(drawn(2, 4, 5, 5), drawn(6, 4, 3, 3))
    y = bias_relu(convolved, drawn(6).detach())
    assert y is convolved
    assert [saved.data_ptr() for saved in y.grad_fn.saved_tensors] == [y.data_ptr()]  # type: ignore[union-attr]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nan_stays_nan_in_both_directions() -> None:
    x = drawn(1, 2, 1, 3)
    with torch.no_grad():
        x[0, 0, 0, 1] = torch.nan
    y = bias_relu(x.clone(), drawn(2).detach())
    assert y.isnan().sum() == 1
    y.backward(torch.full_like(y, torch.nan))
    assert x.grad is not None and bool(x.grad[0, 0, 0, 1].isnan())


def test_a_sum_of_bfloat16_is_rounded_once() -> None:
    x, bias = drawn(4, 64, 9, 9, dtype=torch.bfloat16), drawn(64)
    shortcut = x.detach().flip(0, 2, 3)
    exact = separate(x.double(), bias, shortcut.double())
    rounded = bias_relu(x.clone(), bias, shortcut)
    assert torch.equal(rounded, exact.float().bfloat16())
    errors = [(y.double() - exact).abs().mean() for y in (rounded, separate(x, bias, shortcut))]
    assert errors[0] < 0.9 * errors[1]


def test_only_with_gradients_and_in_the_dtype_of_autocast() -> None:
    cpu = torch.device("cpu")
    assert is_fused_training(cpu) and not is_fused_training(torch.device("meta"))
    with torch.no_grad():
        assert not is_fused_training(cpu)
    assert compute_dtype(cpu, torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = [compute_dtype(cpu, dtype) for dtype in (torch.float32, torch.float64, torch.float16)]
    assert found == [torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_scaled_weights_are_the_product_bit_for_bit(dtype: torch.dtype) -> None:
    weight, scale = drawn(8, 4, 3, 3), drawn(8).detach()[:, None, None, None]
    found, wanted = scaled_weight(weight, scale, dtype), (weight * scale).to(dtype)
    assert torch.equal(found, wanted) and found.dtype == dtype and found.stride() == weight.stride()
    gradient = drawn(8, 4, 3, 3, dtype=dtype).detach()
    slopes = [torch.autograd.grad(y, weight, gradient)[0] for y in (found, wanted)]
    assert torch.equal(*slopes) and slopes[0].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(kernels=True))])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(64, 14), (6, 5), (300, 1)])
@with_shortcut
def test_a_convolution_and_its_pass(device: str, bf16: bool, channels: int, size: int, with_shortcut: bool) -> None:
    """In bfloat16 a ReLU may be open in only one of the two."""
    given = [drawn(3, 8, size, size), drawn(channels, 8, 3, 3), drawn(channels), drawn(4, channels, size, size)[1:]]
    gradient = drawn(5, channels, size, size).detach()[2:]

    def run(fused: bool) -> list[Tensor]:
        x, weight, bias, shortcut = (each.detach().to(device).requires_grad_() for each in given)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y = F.conv2d(x, weight, None, padding=1)
            added = shortcut.to(y.dtype) if with_shortcut else None
            y = bias_relu(y, bias, added) if fused else separate(y, bias, added)
        inputs = [x, weight, bias, *([shortcut] if with_shortcut else [])]
        return [y.detach().float(), *torch.autograd.grad(y, inputs, gradient.to(device, y.dtype))]

    together, apart = run(True), run(False)
    assert bf16 or torch.equal(together[0], apart[0])
    for found, wanted in zip(together, apart, strict=True):
        assert float((found - wanted).norm()) <= (0.1 if bf16 else 1e-5) * float(wanted.norm())


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_torch_compile_keeps_one_graph(device: str) -> None:
    x, weight, bias = (each.detach().to(device) for each in (drawn(2, 4, 5, 5), drawn(6, 4, 3, 3), drawn(6)))
    scale = drawn(6).detach().to(device)[:, None, None, None]
    weight.requires_grad_()

    def compute(weight: Tensor) -> Tensor:
        y = F.conv2d(x.bfloat16(), scaled_weight(weight, scale, torch.bfloat16))
        return bias_relu(y, bias).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    slopes = [torch.autograd.grad(f(weight), weight)[0] for f in (compute, compiled)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)
