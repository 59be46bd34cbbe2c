"""RoI pooling of extreme inputs: RoIs outside the map or with NaN, huge and empty maps, and invalid arguments."""

import math

import pytest
import torch
from detector_examples import small_model
from pooling_examples import CLOSE, KINDS, compiled, devices, kinds, plain, some_map, some_rois

from refdet.ops._library import DEVICES
from refdet.ops.pooling import (
    pyramid_roi_align,
    pyramid_roi_align_mean,
    roi_align,
    roi_align_mean,
    roi_crop,
    roi_crop_mean,
)


@kinds
def test_a_map_of_more_than_2_to_the_31_elements(kind: str) -> None:
    """Only the address space is reserved: pages that are never written take no memory."""
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
    moved_rois = rois - torch.tensor([[0, width - 4, height - 4, width - 4, height - 4]])
    function = KINDS[kind][0]
    torch.testing.assert_close(function(x, rois, 7, 1), function(corner, moved_rois, 7, 1), rtol=2**-6, atol=2e-3)


@kinds
def test_rois_outside_the_map_or_not_finite_give_0(kind: str) -> None:
    x = torch.ones(1, 20, 6, 5, requires_grad=True)
    nan, inf = math.nan, math.inf
    rois = torch.tensor(
        [[0, 100.0, 0, 140, 40], [0, -90, -90, -20, -20], [0, nan, 0, 30, 30], [0, 0, nan, 30, 30], [0, 0, 0, nan, 30],
         [0, 0, 0, 30, nan], [0, -inf, 0, 30, 30], [0, 0, 0, inf, 30], [0, -inf, -inf, inf, inf], [0, inf, 0, 0, 9]]
    )  # fmt: skip
    pooled = KINDS[kind][0](x, rois, 7, 8)
    assert (pooled == 0).all() and len(pooled) == len(rois)
    assert (torch.autograd.grad(pooled.sum(), x)[0] == 0).all()


def test_a_roi_without_area_samples_one_point() -> None:
    x = torch.arange(30.0).reshape(1, 1, 5, 6).repeat(1, 20, 1, 1)
    rois = torch.tensor([[0, 20.0, 12, 20, 12]])  # (2.5, 1.5) on the map, the center of its cell in column 2 and row 1
    assert (roi_align(x, rois, 7, 8) == 1 * 6 + 2).all()
    assert (roi_crop(x, rois, 7, 8) == 1.5 * 6 + 2.5).all()
    assert (roi_align(x, rois, 7, 8, 0) == 0).all()
    assert (roi_align_mean(x, rois, 7, 8) == 8).all() and (roi_crop_mean(x, rois, 7, 8) == 11.5).all()


@devices
@kinds
def test_no_rois_and_empty_maps(kind: str, device: str) -> None:
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
def test_image_numbers_outside_the_batch_are_refused(kind: str, image: float) -> None:
    rois = torch.tensor([[0, 1.0, 2, 30, 40], [image, 1, 2, 30, 40]])
    with pytest.raises(IndexError, match=r"RoI 1 is on image .* of a batch of 2"):
        KINDS[kind][0](torch.randn(2, 20, 6, 5), rois, 7, 8)
    with pytest.raises(IndexError, match=r"RoI 1 is on image .* of a batch of 2"):
        plain(kind, torch.randn(2, 20, 6, 5), rois, 7, 8)


@pytest.mark.gpu(kernels=True)
def test_image_numbers_outside_the_batch_give_nan_on_cuda() -> None:
    x = torch.randn(2, 20, 6, 5, device="cuda", requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 30, 40], [2, 1, 2, 30, 40]], device="cuda")
    for function in (roi_align, roi_align_mean):
        pooled = function(x, rois, 7, 8)
        assert pooled[0].isfinite().all() and pooled[1].isnan().all()
        assert torch.autograd.grad(pooled[0].sum(), x)[0].isfinite().all()


@kinds
def test_invalid_arguments_are_refused(kind: str) -> None:
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


def test_invalid_grids_are_refused() -> None:
    x, rois = torch.randn(1, 4, 6, 5), torch.tensor([[0, 1.0, 2, 30, 40]])
    with pytest.raises(ValueError, match="cells on a side"):
        roi_crop(x, rois, 1, 8)
    for samples in (-1, 5000):
        with pytest.raises(ValueError, match="samples"):
            roi_align(x, rois, 7, 8, samples)


@compiled
def test_the_operators_refuse_invalid_arguments() -> None:
    x, rois = torch.randn(1, 4, 6, 5), torch.tensor([[0, 1.0, 2, 30, 40]])
    pool, backward = torch.ops.refdet.roi_pool, torch.ops.refdet.roi_pool_backward
    for arguments in (
        (x.double(), rois, 7, 8.0, 2, False, False), (x[0], rois, 7, 8.0, 2, False, False),
        (x, rois.double(), 7, 8.0, 2, False, False), (x, rois[:, :4], 7, 8.0, 2, False, False),
        (x, rois, 0, 8.0, 2, False, False), (x, rois, 1, 8.0, 1, True, False), (x, rois, 7, 0.0, 2, False, False),
        (x, rois, 7, 8.0, -1, False, False), (x, rois, 2**40, 8.0, 2, False, False),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="RoI pooling"):
            pool(*arguments)
    for gradient, shape in ((x, [1, 4, 6, 5]), (pool(x, rois, 7, 8.0, 2, False, False), [1, 5, 6, 5])):
        with pytest.raises(RuntimeError, match="gradient has the wrong shape"):
            backward(gradient, rois, shape, 7, 8.0, 2, False, False)


def test_pyramid_mean_is_the_mean_of_the_cells() -> None:
    generator = torch.Generator().manual_seed(10)
    maps = [some_map(generator, 2, 24, 96 // s, 128 // s).requires_grad_() for s in (1, 2, 4, 8)]
    corner = torch.rand(40, 2, generator=generator) * 300
    boxes = torch.cat((corner, corner + torch.rand(40, 2, generator=generator) ** 4 * 900), 1)
    rois = torch.cat((torch.randint(2, (40, 1), generator=generator), boxes), 1)
    rois[3, 2] = math.nan
    cells = pyramid_roi_align(maps, rois, 7, (4, 8, 16, 32))
    mean = pyramid_roi_align_mean(maps, rois, 7, (4, 8, 16, 32))
    torch.testing.assert_close(mean, cells.mean((2, 3)), **CLOSE)
    assert cells.is_contiguous(memory_format=torch.channels_last) and (cells[3] == 0).all()
    weight = torch.randn(mean.shape, generator=generator)
    ours = torch.autograd.grad((mean * weight).sum(), maps)
    theirs = torch.autograd.grad((cells.mean((2, 3)) * weight).sum(), maps)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert all(gradient.any() for gradient in ours)  # each level has RoIs
    assert pyramid_roi_align(maps, rois[:0], 7, (4, 8, 16, 32)).shape == (0, 24, 7, 7)
    with pytest.raises(IndexError, match=r"RoI \d+ is on image 2\.?0? of a batch of 2"):
        pyramid_roi_align(maps, rois + 1, 7, (4, 8, 16, 32))


@pytest.mark.parametrize("pooling", ["align", "crop_and_resize", "crop_align", "fpn"])
def test_pool5_of_the_head_is_the_mean_of_the_cells(pooling: str) -> None:
    if pooling == "fpn":
        model = small_model("model.neck=fpn", "model.anchor_sizes=[16,32,64,128,256]")
    else:
        model = small_model("model.stride=16", f"model.pooling={pooling}")
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        maps = model.extract_feature_maps(torch.randn(2, 3, 128, 160, generator=generator))
        rois = some_rois(generator, 12, 2, turned=False)
        torch.testing.assert_close(
            model.head.pool5(maps, rois), model.head.pool_cells(maps, rois).mean((2, 3)), **CLOSE
        )
