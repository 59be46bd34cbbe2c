"""RoI pooling: kernels and fallback equal torchvision and a reference that adds one sample at a time."""

import math
import os
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling_examples import CLOSE, KINDS, compiled, devices, kinds, plain, sample_by_sample, some_map, some_rois
from torchvision.ops import roi_align as torchvision_roi_align

import refdet
from refdet.ops._library import DEVICES
from refdet.ops.pooling import roi_align, roi_align_mean

pytestmark = pytest.mark.slow


@kinds
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), count=st.sampled_from([0, 1, 6]), size=st.sampled_from([2, 3, 7]), odd=st.booleans())
def test_pooling_equals_its_definition_sample_by_sample(kind: str, seed: int, count: int, size: int, odd: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, rois = some_map(generator, 2, 5, 12, 15), some_rois(generator, count, 2)
    if odd:  # the next test compares what overflows in float32 with the fallback
        rois = torch.where(rois.isfinite() & (rois.abs() < 1e6), rois, 9.0)
    expected = sample_by_sample(kind, x, rois, size, 8).float()
    found = KINDS[kind][0](x, rois, size, 8)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(plain(kind, x, rois, size, 8), expected, **CLOSE)


@compiled
@kinds
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 9),
    shape=st.sampled_from([(2, 5, 12, 15), (3, 16, 1, 1), (1, 21, 1, 7), (2, 217, 6, 5), (1, 0, 4, 4), (2, 4, 0, 3)]),
    size=st.sampled_from([2, 7, 14]),
    stride=st.sampled_from([4, 8.0, 12.5]),
    odd=st.booleans(),
)
def test_kernels_and_fallback_agree(
    kind: str, seed: int, count: int, shape: tuple[int, ...], size: int, stride: float, odd: bool
) -> None:
    """Forward and backward, with numbers of channels that fill and do not fill vectors, and any coordinates."""
    generator = torch.Generator().manual_seed(seed)
    x = some_map(generator, *shape).requires_grad_()
    rois = some_rois(generator, count, shape[0], odd)
    found, expected = KINDS[kind][0](x, rois, size, stride), plain(kind, x, rois, size, stride)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.randn(found.shape, generator=generator)
    (ours,), (theirs,) = (torch.autograd.grad((pooled * weight).sum(), x) for pooled in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # up to 9 * 196 cells add up


@devices
@pytest.mark.parametrize("samples", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [1, 7, 14])
def test_roi_align_equals_torchvision(device: str, samples: int, size: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    x, rois = some_map(generator, 2, 67, 12, 15).to(device), some_rois(generator, 40, 2, turned=False).to(device)
    x.requires_grad_()
    found = roi_align(x, rois, size, 8, samples)
    expected = torchvision_roi_align(x, rois, size, 1 / 8, sampling_ratio=samples, aligned=True)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(roi_align_mean(x, rois, size, 8, samples), expected.mean((2, 3)), **CLOSE)
    weight = torch.randn(found.shape, generator=generator).to(device)
    (ours,), (theirs,) = (torch.autograd.grad((pooled * weight).sum(), x) for pooled in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@devices
@kinds
def test_bfloat16_is_rounded_once(device: str, kind: str) -> None:
    """Pooled cells are the float32 result rounded to bfloat16, at most 2**-9 of it away; means stay float32."""
    generator = torch.Generator().manual_seed(0)
    x, rois = some_map(generator, 2, 88, 12, 15).to(device).bfloat16(), some_rois(generator, 30, 2).to(device)
    function = KINDS[kind][0]
    exact = x.float().requires_grad_()
    rounded = x.clone().requires_grad_()
    found, expected = function(rounded, rois, 7, 8), function(exact, rois, 7, 8)
    if KINDS[kind][3]:
        torch.testing.assert_close(found, expected, **CLOSE)
    else:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)
    weight = torch.randn(found.shape, generator=generator).to(device).bfloat16()
    (ours,), (theirs,) = (
        torch.autograd.grad(f, m, weight.to(f.dtype)) for f, m in ((found, rounded), (expected, exact))
    )
    torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=1e-4)


@compiled
def test_bfloat16_keeps_nan_and_inf() -> None:
    """The kernels round by themselves. (In the fallback, 0 times infinity gives NaN.)"""
    values = torch.tensor([math.nan, math.inf, -math.inf, 3.3895313892515355e38, 0.0, -1.0] * 8)
    x = values.bfloat16().reshape(1, 48, 1, 1).expand(1, 48, 3, 3)
    rois = torch.tensor([[0, 0.0, 0, 3, 3]])
    found = roi_align(x, rois, 1, 1, 1)[0, :, 0, 0]
    torch.testing.assert_close(found, values.bfloat16(), equal_nan=True, rtol=0, atol=0)


@kinds
def test_float16_and_float64_maps(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, rois = some_map(generator, 1, 8, 12, 15), some_rois(generator, 9, 1)
    function = KINDS[kind][0]
    expected = function(x, rois, 7, 8)
    assert function(x.half(), rois, 7, 8).dtype == (torch.float32 if KINDS[kind][3] else torch.float16)
    torch.testing.assert_close(function(x.half(), rois, 7, 8).float(), expected, rtol=2e-3, atol=2e-3)
    assert function(x.double(), rois, 7, 8).dtype == torch.float64
    torch.testing.assert_close(function(x.double(), rois, 7, 8).float(), expected, **CLOSE)


@kinds
def test_gradients_in_float64_and_float32(kind: str) -> None:
    """Gradients in float64 against finite differences, and those of the float32 kernels against float64."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    rois = some_rois(generator, 5, 2)
    rois[:, 1:] /= 4
    function = KINDS[kind][0]
    assert torch.autograd.gradcheck(lambda t: function(t, rois, 3, 8), x)
    single = x.detach().float().requires_grad_()
    weight = torch.randn(function(x, rois, 3, 8).shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(function(x, rois, 3, 8), x, weight)
    (found,) = torch.autograd.grad(function(single, rois, 3, 8), single, weight.float())
    torch.testing.assert_close(found, expected.float(), **CLOSE)


@compiled
@kinds
def test_gradcheck_of_the_kernels(kind: str) -> None:
    """Pooling is linear in the map, so finite differences with wide steps are exact enough in float32."""
    generator = torch.Generator().manual_seed(3)
    x, rois = some_map(generator, 1, 17, 3, 4).requires_grad_(), some_rois(generator, 3, 1)
    rois[:, 1:] /= 4
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(lambda t: KINDS[kind][0](t, rois, 3, 8), x, eps=0.5, atol=1e-4)


@compiled
@devices
@pytest.mark.parametrize("kind", ["fixed", "adaptive mean", "crop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(kind: str, dtype: torch.dtype, device: str) -> None:
    if device not in DEVICES:
        pytest.skip("no CUDA kernels")
    _, samples, crop, mean = KINDS[kind]
    generator = torch.Generator().manual_seed(4)
    x = some_map(generator, 2, 20, 6, 5).to(device, dtype).requires_grad_()
    rois = some_rois(generator, 4, 2).to(device)
    torch.library.opcheck(torch.ops.refdet.roi_pool, (x, rois, 7, 8.0, samples, crop, mean))
    gradient = torch.randn_like(torch.ops.refdet.roi_pool(x, rois, 7, 8.0, samples, crop, mean)).detach()
    shape = list(x.shape)
    torch.library.opcheck(torch.ops.refdet.roi_pool_backward, (gradient, rois, shape, 7, 8.0, samples, crop, mean))


@compiled
@kinds
@pytest.mark.parametrize("dynamic", [False, True])
def test_pooling_compiles_into_one_graph(kind: str, dynamic: bool) -> None:
    function = KINDS[kind][0]
    generator = torch.Generator().manual_seed(5)
    torch._dynamo.reset()
    run = torch.compile(lambda x, rois: function(x, rois, 7, 8), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (3, 5):
        x, rois = some_map(generator, 2, 8, 6, 5).requires_grad_(), some_rois(generator, count, 2)
        found, expected = run(x, rois), function(x, rois, 7, 8)
        assert torch.equal(found, expected)
        weight = torch.randn(found.shape, generator=generator)
        assert torch.equal(torch.autograd.grad(found, x, weight)[0], torch.autograd.grad(expected, x, weight)[0])


@compiled
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    maps = [some_map(generator, *shape).to(dtype).requires_grad_() for shape in ((3, 300, 12, 15), (1, 21, 12, 15))]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([])
            for x in maps:
                rois = some_rois(torch.Generator().manual_seed(7), 70, len(x))
                pooled = KINDS[kind][0](x, rois, 7, 8)
                found[-1] += [pooled, torch.autograd.grad((pooled * pooled.detach()).sum(), x)[0]]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@kinds
def test_maps_and_rois_may_have_any_memory_layout(kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    x, rois, function = some_map(generator, 2, 24, 12, 15), some_rois(generator, 9, 2), KINDS[kind][0]
    expected = function(x, rois, 7, 8)
    wide = some_map(generator, 4, 48, 14, 18)
    wide[1:3, 8:32, 1:13, 2:17] = x
    for same in (
        x.contiguous(),
        wide[1:3, 8:32, 1:13, 2:17],  # channels_last, with gaps between rows and images
        wide.contiguous()[1:3, 8:32, 1:13, 2:17],
        x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3),
        x.flip(0).flip(0),
    ):
        assert torch.equal(same, x)
        torch.testing.assert_close(function(same, rois, 7, 8), expected, **CLOSE)
        strided = rois.repeat(1, 2)[:, 5:]
        torch.testing.assert_close(function(same, strided, 7, 8), expected, **CLOSE)
    flat = x[:, :, :1, :1].expand(2, 24, 12, 15).requires_grad_()
    (gradient,) = torch.autograd.grad(function(flat, rois, 7, 8).sum(), flat)
    assert gradient.shape == flat.shape


@kinds
def test_the_gradient_may_have_any_memory_layout(kind: str) -> None:
    generator = torch.Generator().manual_seed(9)
    x, rois = some_map(generator, 2, 24, 12, 15).requires_grad_(), some_rois(generator, 9, 2)
    pooled = KINDS[kind][0](x, rois, 7, 8)
    weight = torch.randn(pooled.shape, generator=generator)
    (expected,) = torch.autograd.grad(pooled, x, weight, retain_graph=True)
    (found,) = torch.autograd.grad(pooled, x, weight.transpose(0, 1).contiguous().transpose(0, 1), retain_graph=True)
    torch.testing.assert_close(found, expected, **CLOSE)
    (ones,) = torch.autograd.grad(pooled.sum(), x, retain_graph=True)  # expanded from one number
    torch.testing.assert_close(ones, torch.autograd.grad(pooled, x, torch.ones_like(pooled))[0], **CLOSE)


@compiled
@kinds
def test_the_gradient_runs_no_python(kind: str) -> None:
    """On a GPU, Python code would take longer than the kernels of a small map."""
    generator = torch.Generator().manual_seed(6)
    x, rois = some_map(generator, 2, 20, 6, 5).requires_grad_(), some_rois(generator, 4, 2)
    _, samples, crop, mean = KINDS[kind]
    called: list[str] = []

    def record_call(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_filename)

    sys.setprofile(record_call)
    try:
        torch.ops.refdet.roi_pool(x, rois, 7, 8.0, samples, crop, mean).sum().backward()
    finally:
        sys.setprofile(None)
    assert x.grad is not None
    assert called  # of torch itself
    folder = Path(torch.__file__).parent
    python = (f"{Path(refdet.__file__).parent}{os.sep}", str(folder / "library.py"), f"{folder / '_library'}{os.sep}")
    assert not [name for name in called if name.startswith(python)]
