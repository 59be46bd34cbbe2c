"""RoI pooling: the kernels, the fallback, torchvision and one sample at a time, all alike; and what must not crash."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from refdet.ops._library import DEVICES
from refdet.ops.pooling import (
    pyramid_roi_align,
    pyramid_roi_align_mean,
    roi_align,
    roi_align_mean,
    roi_crop,
    roi_crop_mean,
)
from refdet.ops.pooling_plain import pool_plain

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # of float32, for values about 1
KINDS: dict[str, tuple[Callable[..., Tensor], int, bool, bool]] = {  # function, samples, crop, mean
    "fixed": (roi_align, 2, False, False),
    "three": (lambda *a: roi_align(*a, 3), 3, False, False),
    "adaptive": (lambda *a: roi_align(*a, 0), 0, False, False),
    "crop": (roi_crop, 1, True, False),
    "fixed mean": (roi_align_mean, 2, False, True),
    "adaptive mean": (lambda *a: roi_align_mean(*a, 0), 0, False, True),
    "crop mean": (roi_crop_mean, 1, True, True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def plain(kind: str, x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    _, samples, crop, mean = KINDS[kind]
    pooled = pool_plain(x, rois, size, stride, samples, crop, mean)
    return pooled.flatten(1) if mean else pooled


def some_map(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


def some_rois(generator: torch.Generator, count: int, batch: int, odd: bool = False, turned: bool = True) -> Tensor:
    """Boxes in, across and outside a map of 12x15 at stride 8: small, large, of no area, some with swapped corners."""
    corner = torch.rand(count, 2, generator=generator) * 160 - 40
    sides = torch.rand(count, 2, generator=generator) ** 3 * 200
    if turned:
        sides *= torch.rand(count, 2, generator=generator).sub(0.1).sign()
    sides *= torch.rand(count, 2, generator=generator) > 0.1
    boxes = torch.cat((corner, corner + sides), 1)
    boxes = torch.where(torch.rand(count, 1, generator=generator) < 0.3, boxes.round(), boxes)
    if odd:
        values = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -3e38, 1e-40, 1e7, 0.0])
        chosen = values[torch.randint(len(values), boxes.shape, generator=generator)]
        boxes = torch.where(torch.rand(boxes.shape, generator=generator) < 0.1, chosen, boxes)
    return torch.cat((torch.randint(batch, (count, 1), generator=generator), boxes), 1)


def sample_by_sample(kind: str, x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    """The definition, in Python's float64."""
    _, samples, crop, mean = KINDS[kind]
    height, width = x.shape[2:]

    def axis(low: float, high: float, limit: int) -> list[list[tuple[int, float]]]:
        each = samples or min(max(math.ceil((high - low) / size), 0), 1024)
        cells: list[list[tuple[int, float]]] = []
        for cell in range(size):
            taps = []
            for sample in range(each):
                if crop:
                    at = low + (high - low) * cell / (size - 1)
                    keep = -1 < at < limit
                else:
                    at = low + (high - low) * (cell + (sample + 0.5) / each) / size - 0.5
                    keep, at = -1 <= at <= limit, min(max(at, 0), limit - 1)
                if keep:
                    floor = math.floor(at)
                    taps += [(floor, (1 - at + floor) / each), (floor + 1, (at - floor) / each)]
            cells.append([(p, w) for p, w in taps if 0 <= p < limit])
        return cells

    out = torch.zeros(len(rois), x.shape[1], size, size, dtype=torch.float64)
    for roi, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            continue
        columns, rows = axis(x1 / stride, x2 / stride, width), axis(y1 / stride, y2 / stride, height)
        for i, down in enumerate(rows):
            for j, across in enumerate(columns):
                for y, wy in down:
                    for column, wx in across:
                        out[roi, :, i, j] += wy * wx * x[int(image), :, y, column].double()
    return out.mean((2, 3)) if mean else out


@kinds
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), count=st.sampled_from([0, 1, 6]), size=st.sampled_from([2, 3, 7]), odd=st.booleans())
def test_pooling_is_its_definition(kind: str, seed: int, count: int, size: int, odd: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, rois = some_map(generator, 2, 5, 12, 15), some_rois(generator, count, 2)
    if odd:  # what float32 overflows to is compared with the fallback instead, below
        rois = torch.where(rois.isfinite() & (rois.abs() < 1e6), rois, 9.0)
    wanted = sample_by_sample(kind, x, rois, size, 8).float()
    found = KINDS[kind][0](x, rois, size, 8)
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(plain(kind, x, rois, size, 8), wanted, **CLOSE)


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
def test_the_kernels_and_the_fallback_agree(
    kind: str, seed: int, count: int, shape: tuple[int, ...], size: int, stride: float, odd: bool
) -> None:
    """Forward and backward, with every width of channels and any coordinates."""
    generator = torch.Generator().manual_seed(seed)
    x = some_map(generator, *shape).requires_grad_()
    rois = some_rois(generator, count, shape[0], odd)
    found, wanted = KINDS[kind][0](x, rois, size, stride), plain(kind, x, rois, size, stride)
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, **CLOSE)
    weight = torch.randn(found.shape, generator=generator)
    (ours,), (theirs,) = (torch.autograd.grad((pooled * weight).sum(), x) for pooled in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # up to 9 * 196 cells add up


@devices
@pytest.mark.parametrize("samples", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [1, 7, 14])
def test_roi_align_is_torchvisions(device: str, samples: int, size: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    x, rois = some_map(generator, 2, 67, 12, 15).to(device), some_rois(generator, 40, 2, turned=False).to(device)
    x.requires_grad_()
    found = roi_align(x, rois, size, 8, samples)
    wanted = torchvision_roi_align(x, rois, size, 1 / 8, sampling_ratio=samples, aligned=True)
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(roi_align_mean(x, rois, size, 8, samples), wanted.mean((2, 3)), **CLOSE)
    weight = torch.randn(found.shape, generator=generator).to(device)
    (ours,), (theirs,) = (torch.autograd.grad((pooled * weight).sum(), x) for pooled in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@devices
@kinds
def test_bfloat16_is_rounded_once(device: str, kind: str) -> None:
    """The float32 answer of the same numbers, rounded to the nearest bfloat16: 2**-9 of it at most. Means are not."""
    generator = torch.Generator().manual_seed(0)
    x, rois = some_map(generator, 2, 88, 12, 15).to(device).bfloat16(), some_rois(generator, 30, 2).to(device)
    function = KINDS[kind][0]
    exact = x.float().requires_grad_()
    rounded = x.clone().requires_grad_()
    found, wanted = function(rounded, rois, 7, 8), function(exact, rois, 7, 8)
    if KINDS[kind][3]:
        torch.testing.assert_close(found, wanted, **CLOSE)
    else:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-5)
    weight = torch.randn(found.shape, generator=generator).to(device).bfloat16()
    (ours,), (theirs,) = (torch.autograd.grad(f, m, weight.to(f.dtype)) for f, m in ((found, rounded), (wanted, exact)))
    torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=1e-4)


@compiled
def test_bfloat16_keeps_numbers_that_are_not_finite() -> None:
    """Rounding is the kernels' own; in plain PyTorch 0 times infinity shows."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 3.3895313892515355e38, 0.0, -1.0] * 8)
    x = values.bfloat16().reshape(1, 48, 1, 1).expand(1, 48, 3, 3)
    rois = torch.tensor([[0, 0.0, 0, 3, 3]])
    found = roi_align(x, rois, 1, 1, 1)[0, :, 0, 0]
    torch.testing.assert_close(found, values.bfloat16(), equal_nan=True, rtol=0, atol=0)


@kinds
def test_half_and_double_maps(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, rois = some_map(generator, 1, 8, 12, 15), some_rois(generator, 9, 1)
    function = KINDS[kind][0]
    wanted = function(x, rois, 7, 8)
    assert function(x.half(), rois, 7, 8).dtype == (torch.float32 if KINDS[kind][3] else torch.float16)
    torch.testing.assert_close(function(x.half(), rois, 7, 8).float(), wanted, rtol=2e-3, atol=2e-3)
    assert function(x.double(), rois, 7, 8).dtype == torch.float64
    torch.testing.assert_close(function(x.double(), rois, 7, 8).float(), wanted, **CLOSE)


@kinds
def test_gradients(kind: str) -> None:
    """In float64 against differences of the function; the kernels' float32 gradients against those of float64."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    rois = some_rois(generator, 5, 2)
    rois[:, 1:] /= 4
    function = KINDS[kind][0]
    assert torch.autograd.gradcheck(lambda t: function(t, rois, 3, 8), x)
    single = x.detach().float().requires_grad_()
    weight = torch.randn(function(x, rois, 3, 8).shape, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(function(x, rois, 3, 8), x, weight)
    (found,) = torch.autograd.grad(function(single, rois, 3, 8), single, weight.float())
    torch.testing.assert_close(found, wanted.float(), **CLOSE)


@compiled
@kinds
def test_gradcheck_of_the_kernels(kind: str) -> None:
    """Pooling is linear in the map, so that wide steps do in float32."""
    generator = torch.Generator().manual_seed(3)
    x, rois = some_map(generator, 1, 17, 3, 4).requires_grad_(), some_rois(generator, 3, 1)
    rois[:, 1:] /= 4
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(lambda t: KINDS[kind][0](t, rois, 3, 8), x, eps=0.5, atol=1e-4)


@compiled
@devices
@pytest.mark.parametrize("kind", ["fixed", "adaptive mean", "crop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kind: str, dtype: torch.dtype, device: str) -> None:
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
def test_compiles_into_one_graph(kind: str, dynamic: bool) -> None:
    function = KINDS[kind][0]
    generator = torch.Generator().manual_seed(5)
    torch._dynamo.reset()
    run = torch.compile(lambda x, rois: function(x, rois, 7, 8), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (3, 5):
        x, rois = some_map(generator, 2, 8, 6, 5).requires_grad_(), some_rois(generator, count, 2)
        found, wanted = run(x, rois), function(x, rois, 7, 8)
        assert torch.equal(found, wanted)
        weight = torch.randn(found.shape, generator=generator)
        assert torch.equal(torch.autograd.grad(found, x, weight)[0], torch.autograd.grad(wanted, x, weight)[0])


@compiled
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
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
def test_any_layout_of_the_map(kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    x, rois, function = some_map(generator, 2, 24, 12, 15), some_rois(generator, 9, 2), KINDS[kind][0]
    wanted = function(x, rois, 7, 8)
    wide = some_map(generator, 4, 48, 14, 18)
    wide[1:3, 8:32, 1:13, 2:17] = x
    for same in (
        x.contiguous(),
        wide[1:3, 8:32, 1:13, 2:17],  # channels side by side, with gaps between all else
        wide.contiguous()[1:3, 8:32, 1:13, 2:17],
        x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3),
        x.flip(0).flip(0),
    ):
        assert torch.equal(same, x)
        torch.testing.assert_close(function(same, rois, 7, 8), wanted, **CLOSE)
        strided = rois.repeat(1, 2)[:, 5:]
        torch.testing.assert_close(function(same, strided, 7, 8), wanted, **CLOSE)
    flat = x[:, :, :1, :1].expand(2, 24, 12, 15).requires_grad_()
    (gradient,) = torch.autograd.grad(function(flat, rois, 7, 8).sum(), flat)
    assert gradient.shape == flat.shape


@kinds
def test_the_gradient_may_have_any_layout(kind: str) -> None:
    generator = torch.Generator().manual_seed(9)
    x, rois = some_map(generator, 2, 24, 12, 15).requires_grad_(), some_rois(generator, 9, 2)
    pooled = KINDS[kind][0](x, rois, 7, 8)
    weight = torch.randn(pooled.shape, generator=generator)
    (wanted,) = torch.autograd.grad(pooled, x, weight, retain_graph=True)
    (found,) = torch.autograd.grad(pooled, x, weight.transpose(0, 1).contiguous().transpose(0, 1), retain_graph=True)
    torch.testing.assert_close(found, wanted, **CLOSE)
    (ones,) = torch.autograd.grad(pooled.sum(), x, retain_graph=True)  # expanded from one number
    torch.testing.assert_close(ones, torch.autograd.grad(pooled, x, torch.ones_like(pooled))[0], **CLOSE)


@kinds
def test_a_map_of_more_than_2_to_the_31_numbers(kind: str) -> None:
    """Its memory is only reserved: what is never written takes none."""
    if "cpu" not in DEVICES:
        pytest.skip("plain PyTorch copies the map")
    channels, height, width = 1024, 1449, 1449
    try:
        x = torch.empty((1, height, width, channels), dtype=torch.bfloat16).permute(0, 3, 1, 2)
    except RuntimeError:
        pytest.skip("no address space for 4.3 GB")
    assert x.numel() > 2**31
    corner = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:, :, -4:, -4:] = corner
    rois = torch.tensor([[0, width - 3.5, height - 3.5, width - 1, height - 1]])
    near = rois - torch.tensor([[0, width - 4, height - 4, width - 4, height - 4]])
    function = KINDS[kind][0]
    torch.testing.assert_close(function(x, rois, 7, 1), function(corner, near, 7, 1), rtol=2**-6, atol=2e-3)


@kinds
def test_what_reads_nothing_is_0(kind: str) -> None:
    x = torch.ones(1, 20, 6, 5, requires_grad=True)
    nan, inf = math.nan, math.inf
    rois = torch.tensor(
        [[0, 100.0, 0, 140, 40], [0, -90, -90, -20, -20], [0, nan, 0, 30, 30], [0, 0, nan, 30, 30], [0, 0, 0, nan, 30],
         [0, 0, 0, 30, nan], [0, -inf, 0, 30, 30], [0, 0, 0, inf, 30], [0, -inf, -inf, inf, inf], [0, inf, 0, 0, 9]]
    )  # fmt: skip
    pooled = KINDS[kind][0](x, rois, 7, 8)
    assert (pooled == 0).all() and len(pooled) == len(rois)
    assert (torch.autograd.grad(pooled.sum(), x)[0] == 0).all()


def test_boxes_without_area_are_points() -> None:
    x = torch.arange(30.0).reshape(1, 1, 5, 6).repeat(1, 20, 1, 1)
    rois = torch.tensor([[0, 20.0, 12, 20, 12]])  # at (2.5, 1.5), which is the middle of position (2, 1)
    assert (roi_align(x, rois, 7, 8) == 1 * 6 + 2).all()
    assert (roi_crop(x, rois, 7, 8) == 1.5 * 6 + 2.5).all()
    assert (roi_align(x, rois, 7, 8, 0) == 0).all()
    assert (roi_align_mean(x, rois, 7, 8) == 8).all() and (roi_crop_mean(x, rois, 7, 8) == 11.5).all()


@devices
@kinds
def test_no_rois_and_no_map(kind: str, device: str) -> None:
    function = KINDS[kind][0]
    for shape, count in (
        ((2, 20, 6, 5), 0),
        ((2, 20, 0, 5), 2),
        ((2, 20, 6, 0), 2),
        ((2, 0, 6, 5), 2),
        ((0, 4, 6, 5), 0),
    ):
        x = torch.randn(shape, device=device).requires_grad_()
        rois = torch.tensor([[0, 1.0, 2, 30, 40]], device=device).expand(count, 5)
        pooled = function(x, rois, 7, 8)
        assert pooled.shape[:2] == (count, shape[1]) and (pooled == 0).all()
        (gradient,) = torch.autograd.grad(pooled.sum(), x)
        assert gradient.shape == shape and (gradient == 0).all()


@kinds
@pytest.mark.parametrize("image", [-1.0, 2.0, 1e30, math.nan, math.inf, -math.inf, -0.5])
def test_images_outside_of_the_batch(kind: str, image: float) -> None:
    rois = torch.tensor([[0, 1.0, 2, 30, 40], [image, 1, 2, 30, 40]])
    with pytest.raises(IndexError, match=r"RoI 1 is on image .* of a batch of 2"):
        KINDS[kind][0](torch.randn(2, 20, 6, 5), rois, 7, 8)
    with pytest.raises(IndexError, match=r"RoI 1 is on image .* of a batch of 2"):
        plain(kind, torch.randn(2, 20, 6, 5), rois, 7, 8)


@pytest.mark.skipif("cuda" not in DEVICES or not torch.cuda.is_available(), reason="no CUDA kernels, or no GPU")
def test_images_outside_of_the_batch_on_cuda() -> None:
    x = torch.randn(2, 20, 6, 5, device="cuda", requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 30, 40], [2, 1, 2, 30, 40]], device="cuda")
    for function in (roi_align, roi_align_mean):
        pooled = function(x, rois, 7, 8)
        assert pooled[0].isfinite().all() and pooled[1].isnan().all()
        assert torch.autograd.grad(pooled[0].sum(), x)[0].isfinite().all()


@kinds
def test_wrong_arguments_are_refused(kind: str) -> None:
    function = KINDS[kind][0]
    x, rois = torch.randn(1, 4, 6, 5), torch.tensor([[0, 1.0, 2, 30, 40]])
    with pytest.raises(TypeError, match="floating-point"):
        function(x.int(), rois, 7, 8)
    with pytest.raises(TypeError, match="floating-point"):
        function(x, rois.long(), 7, 8)
    with pytest.raises(ValueError, match=r"map \(B, C, H, W\)"):
        function(x[0], rois, 7, 8)
    with pytest.raises(ValueError, match=r"RoIs \(K, 5\)"):
        function(x, rois[:, 1:], 7, 8)
    with pytest.raises(ValueError, match=r"RoIs \(K, 5\)"):
        function(x, rois[0], 7, 8)
    with pytest.raises(ValueError, match="one device"):
        function(x, rois.to("meta"), 7, 8)
    for size in (0, -3, 5000):
        with pytest.raises(ValueError, match="cells on a side"):
            function(x, rois, size, 8)
    for stride in (0, -8, math.nan, math.inf):
        with pytest.raises(ValueError, match="stride"):
            function(x, rois, 7, stride)


def test_wrong_grids_are_refused() -> None:
    x, rois = torch.randn(1, 4, 6, 5), torch.tensor([[0, 1.0, 2, 30, 40]])
    with pytest.raises(ValueError, match="cells on a side"):
        roi_crop(x, rois, 1, 8)
    for samples in (-1, 5000):
        with pytest.raises(ValueError, match="samples"):
            roi_align(x, rois, 7, 8, samples)


@compiled
def test_the_operators_check_by_themselves() -> None:
    x, rois = torch.randn(1, 4, 6, 5), torch.tensor([[0, 1.0, 2, 30, 40]])
    pool, back = torch.ops.refdet.roi_pool, torch.ops.refdet.roi_pool_backward
    for wrong in (
        (x.double(), rois, 7, 8.0, 2, False, False), (x[0], rois, 7, 8.0, 2, False, False),
        (x, rois.double(), 7, 8.0, 2, False, False), (x, rois[:, :4], 7, 8.0, 2, False, False),
        (x, rois, 0, 8.0, 2, False, False), (x, rois, 1, 8.0, 1, True, False), (x, rois, 7, 0.0, 2, False, False),
        (x, rois, 7, 8.0, -1, False, False), (x, rois, 2**40, 8.0, 2, False, False),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="RoI pooling"):
            pool(*wrong)
    for gradient, shape in ((x, [1, 4, 6, 5]), (pool(x, rois, 7, 8.0, 2, False, False), [1, 5, 6, 5])):
        with pytest.raises(RuntimeError, match="gradient does not fit"):
            back(gradient, rois, shape, 7, 8.0, 2, False, False)


def test_the_mean_of_a_pyramid() -> None:
    generator = torch.Generator().manual_seed(10)
    maps = [some_map(generator, 2, 24, 96 // s, 128 // s).requires_grad_() for s in (1, 2, 4, 8)]
    corner = torch.rand(40, 2, generator=generator) * 300
    boxes = torch.cat((corner, corner + torch.rand(40, 2, generator=generator) ** 4 * 900), 1)
    rois = torch.cat((torch.randint(2, (40, 1), generator=generator), boxes), 1)
    rois[3, 2] = math.nan
    cells, mean = (
        pyramid_roi_align(maps, rois, 7, (4, 8, 16, 32)),
        pyramid_roi_align_mean(maps, rois, 7, (4, 8, 16, 32)),
    )
    torch.testing.assert_close(mean, cells.mean((2, 3)), **CLOSE)
    assert cells.is_contiguous(memory_format=torch.channels_last) and (cells[3] == 0).all()
    weight = torch.randn(mean.shape, generator=generator)
    ours = torch.autograd.grad((mean * weight).sum(), maps)
    theirs = torch.autograd.grad((cells.mean((2, 3)) * weight).sum(), maps)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert all(gradient.any() for gradient in ours)  # each level has RoIs
    assert pyramid_roi_align(maps, rois[:0], 7, (4, 8, 16, 32)).shape == (0, 24, 7, 7)
    with pytest.raises(IndexError):
        pyramid_roi_align(maps, rois + 1, 7, (4, 8, 16, 32))


@pytest.mark.parametrize("pooling", ["align", "crop_and_resize", "crop_align", "fpn"])
def test_pool5_is_the_mean_of_the_cells(pooling: str) -> None:
    from detector_examples import small_model

    changes = (
        ["model.neck=fpn", "model.anchor_sizes=[16,32,64,128,256]"]
        if pooling == "fpn"
        else ["model.stride=16", f"model.pooling={pooling}"]
    )
    model = small_model(*changes).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        maps = model.extract_feature_maps(torch.randn(2, 3, 128, 160, generator=generator))
        rois = some_rois(generator, 12, 2, turned=False)
        torch.testing.assert_close(model.head.pool5(maps, rois), model.head.pooled(maps, rois).mean((2, 3)), **CLOSE)


def test_without_the_extension(tmp_path: Path) -> None:
    """REFDET_NO_EXT=1: the same answers, by the fallback."""
    script = """
import sys, torch
from refdet.ops._library import DEVICES
from refdet.ops.pooling import *
assert not DEVICES
x, rois = torch.load(sys.argv[1])
torch.save([roi_align(x, rois, 7, 8), roi_align(x, rois, 7, 8, 0), roi_crop_mean(x, rois, 7, 8)], sys.argv[1])
"""
    generator = torch.Generator().manual_seed(12)
    x, rois = some_map(generator, 2, 24, 12, 15), some_rois(generator, 9, 2, odd=True)
    path = tmp_path / "tensors.pt"
    torch.save((x, rois), path)
    subprocess.run([sys.executable, "-c", script, path], check=True, env=os.environ | {"REFDET_NO_EXT": "1"})
    found = torch.load(path)
    wanted = [roi_align(x, rois, 7, 8), roi_align(x, rois, 7, 8, 0), roi_crop_mean(x, rois, 7, 8)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
