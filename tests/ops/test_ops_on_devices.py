"""The operators on a GPU equal those on the CPU, with NaN and inf, empty inputs and other streams, and are repeatable.

NMS and matching are equal bit for bit, pooling up to the rounding of its sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from devices import is_gpu, on_devices, on_every_gpu, runs
from pooling_examples import CLOSE, KINDS, kinds, plain, some_map, some_rois
from torch import Tensor

from refdet.detector.finite import all_finite
from refdet.ops._library import DEVICES
from refdet.ops.matching import match_boxes, match_boxes_plain
from refdet.ops.nms import nms, nms_plain
from refdet.ops.pooling import pyramid_roi_align, pyramid_roi_align_mean, roi_align

ODD = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 1e-40])
COUNTS = (0, 1, 63, 64, 65, 700)


def some_boxes(count: int, seed: int, odd: bool) -> Tensor:
    """Boxes that overlap, some empty, reversed or duplicated; if `odd`, a tenth of the coordinates is from `ODD`."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 60, (count, 2), generator=random).float()
    sides = torch.randint(-1, 30, (count, 2), generator=random).float()
    boxes = torch.cat((corner, corner + sides), 1)
    boxes = torch.cat((boxes, boxes))[torch.randint(max(count, 1), (count,), generator=random)]
    return replace_some(boxes, random) if odd else boxes


def replace_some(values: Tensor, random: torch.Generator) -> Tensor:
    chosen = ODD[torch.randint(len(ODD), values.shape, generator=random)]
    return torch.where(torch.rand(values.shape, generator=random) < 0.1, chosen, values)


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


@on_every_gpu
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("count", [*COUNTS, 4500])
def test_nms(device: str, count: int, odd: bool) -> None:
    random = torch.Generator().manual_seed(count)
    boxes, scores = some_boxes(count, count, odd), torch.randint(0, 50, (count,), generator=random) / 50
    if odd:
        scores = replace_some(scores, random)
    groups, images = (torch.randint(-2, 3, (count,), generator=random) * 10**12 for _ in range(2))
    for options in (
        {},
        {"groups": groups, "max_keep": 20},
        {"groups": groups, "images": images},
        {"images": images, "max_keep": 5},
    ):
        expected = nms_plain(boxes, scores, 0.3, **options)
        on_device = {name: value.to(device) if name != "max_keep" else value for name, value in options.items()}
        compute = functools.partial(nms, boxes.to(device), scores.to(device), 0.3, **on_device)
        assert_equal(runs(compute, device), [expected] * 3)


@on_every_gpu
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(("count", "objects"), [(0, 0), (0, 3), (5, 0), (1, 1), (300, 257), (3000, 20)])
def test_matching(device: str, count: int, objects: int, odd: bool) -> None:
    candidates, targets = some_boxes(count, 1, odd), some_boxes(objects, 2, odd)
    expected = match_boxes_plain(candidates, targets)
    for found in runs(lambda: match_boxes(candidates.to(device), targets.to(device)), device):
        assert_equal(found, expected)


@on_every_gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("images", "count", "objects"), [(0, 3, 2), (2, 0, 3), (3, 5, 0), (16, 3000, 7)])
def test_matching_of_a_batch(device: str, images: int, count: int, objects: int, shared: bool) -> None:
    rows = some_boxes(count * (1 if shared else images), 1, True)
    candidates = rows if shared else rows.reshape(images, count, 4)
    targets = some_boxes(images * objects, 2, True).reshape(images, objects, 4)
    expected = match_boxes_plain(candidates, targets)
    for found in runs(lambda: match_boxes(candidates.to(device), targets.to(device)), device):
        assert_equal(found, expected)


def pool_and_gradient(
    function: Callable[..., Tensor], x: Tensor, rois: Tensor, weight: Tensor, device: str
) -> tuple[Tensor, Tensor]:
    """The pooled features on a device, and the gradient of the map for given weights of their sum."""
    there = x.detach().to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = function(there, rois.to(device), 7, 8)
    (gradient,) = torch.autograd.grad(found, there, weight.to(device, found.dtype))
    return found.detach(), gradient


@on_every_gpu
@kinds
@pytest.mark.parametrize(("images", "channels", "count"), [(1, 1, 1), (5, 36, 70), (2, 256, 0), (16, 8, 100)])
def test_pooling_and_its_gradient(device: str, kind: str, images: int, channels: int, count: int) -> None:
    """RoIs are in no order of their images, and the last of several images has none."""
    random = torch.Generator().manual_seed(count)
    x, rois = some_map(random, images, channels, 12, 15), some_rois(random, count, max(images - 1, 1), odd=True)
    weight = torch.randn(plain(kind, x, rois, 7, 8).shape, generator=random)
    expected = pool_and_gradient(lambda *given: plain(kind, *given), x, rois, weight, "cpu")
    found = runs(lambda: pool_and_gradient(KINDS[kind][0], x, rois, weight, device), device)
    for values, gradient in found:
        torch.testing.assert_close(values.cpu(), expected[0], **CLOSE)
        torch.testing.assert_close(gradient.cpu(), expected[1], rtol=1e-5, atol=1e-4)
    if device == "cpu" or "cuda" in DEVICES:  # the fallback sums gradients in any order on a GPU
        for other in found[1:]:
            assert_equal(other, found[0])


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pooling_of_other_dtypes_is_close_to_float32(device: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x, rois = some_map(random, 3, 40, 12, 15).to(dtype), some_rois(random, 50, 3)
    expected = plain("fixed", x.float(), rois, 7, 8)
    first, second, third = runs(lambda: roi_align(x.to(device), rois.to(device), 7, 8), device)
    assert first.dtype == dtype
    torch.testing.assert_close(first.cpu().float(), expected, rtol=2**-8, atol=1e-4)
    assert_equal([second, third], [first, first])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(kernels=True))])
def test_the_gradient_of_an_image_does_not_depend_on_the_batch(device: str) -> None:
    """Bit for bit: the RoIs of an image are summed in the same order in any batch."""
    random = torch.Generator().manual_seed(0)
    x, rois = some_map(random, 6, 24, 12, 15), some_rois(random, 300, 6)
    weight = torch.randn(300, 24, 7, 7, generator=random)
    _, whole = pool_and_gradient(roi_align, x, rois, weight, device)
    for image in range(6):
        own = rois[:, 0] == image
        alone = torch.cat((torch.zeros(int(own.sum()), 1), rois[own, 1:]), 1)
        _, gradient = pool_and_gradient(roi_align, x[image : image + 1], alone, weight[own], device)
        assert_equal([gradient[0]], [whole[image]])


@on_devices
@pytest.mark.parametrize("function", [pyramid_roi_align, pyramid_roi_align_mean])
@pytest.mark.parametrize("count", [0, 3, 200])
def test_pyramid_pooling(device: str, function: Callable[..., Tensor], count: int) -> None:
    random, strides = torch.Generator().manual_seed(0), (4, 8, 16, 32)
    maps = [some_map(random, 2, 16, 384 // stride, 480 // stride) for stride in strides]
    sides = torch.rand(count, 2, generator=random) ** 2 * 400 + 4
    corner = torch.rand(count, 2, generator=random) * 100
    rois = torch.cat((torch.randint(2, (count, 1), generator=random), corner, corner + sides), 1)
    expected = function(maps, rois, 7, strides)
    for found in runs(lambda: function([x.to(device) for x in maps], rois.to(device), 7, strides), device):
        torch.testing.assert_close(found.cpu(), expected, **CLOSE)


@on_devices
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.3e38])
def test_all_finite_finds_one_value_that_is_not_finite(device: str, value: float) -> None:
    values = torch.zeros(3, 70000, device=device)
    assert all_finite(values, values[:0])
    values[1, 69999] = value
    assert bool(all_finite(values[:1], values)) == math.isfinite(value)


@on_devices
def test_tensors_on_different_devices_are_refused(device: str) -> None:
    there, here = torch.zeros(2, 4, device=device if is_gpu(device) else "meta"), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="on one device"):
        nms(there, here[:, 0], 0.5)
    with pytest.raises(ValueError, match="on one device"):
        match_boxes(here, there)
    with pytest.raises(ValueError, match="on one device"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5, device=there.device), 7, 8)
