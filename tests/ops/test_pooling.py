"""RoIAlign and the reference's cropping against torchvision and ``grid_sample``, with their gradients."""

import pytest
import torch
from detector_examples import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.ops import roi_align as torchvision_roi_align

from refdet.ops.pooling import roi_align, roi_crop


def some_rois(seed: int, count: int) -> torch.Tensor:
    """Boxes in, across and outside an image of 96x128."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 160 - 40
    size = torch.rand(count, 2, generator=random) ** 3 * 120
    image = torch.randint(0, 2, (count, 1), generator=random)
    return torch.cat((image, corner, corner + size), dim=1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(0, 9), st.sampled_from([4, 8, 32, 128]), st.sampled_from([1, 7, 14]))
def test_roi_align_equals_torchvision(seed: int, count: int, stride: int, size: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 5, max(96 // stride, 1), max(128 // stride, 1), dtype=torch.float64, requires_grad=True)
    rois = some_rois(seed, count).double()
    found = roi_align(x, rois, size, stride)
    expected = torchvision_roi_align(x, rois, size, 1 / stride, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(found, expected)
    if count:
        weight = torch.randn_like(found)
        torch.testing.assert_close(
            torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((expected * weight).sum(), x)
        )


def test_roi_align_passes_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 30, 25], [1, -9, -9, 12, 40]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: roi_align(t, rois, 3, 8), x)


def test_the_output_is_channels_last_in_the_dtype_of_the_map() -> None:
    x = torch.randn(1, 8, 6, 6).bfloat16()
    found = roi_align(x, torch.tensor([[0, 0.0, 0, 48, 48]]), 7, 8)
    assert found.dtype == torch.bfloat16 and found.shape == (1, 8, 7, 7)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_map_does_not_matter(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 12, 16)
    rois = some_rois(1, 6)
    expected = torchvision_roi_align(x, rois, 7, 1 / 8, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(roi_align(x.contiguous(memory_format=layout), rois, 7, 8), expected)


def crop_by_grid_sample(x: torch.Tensor, rois: torch.Tensor, size: int, stride: float) -> torch.Tensor:
    """Crop as the reference does: sample an affine grid from corner to corner, with zeros outside the map."""
    height, width = x.shape[2:]
    crops = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (value / stride for value in corners)
        theta = torch.tensor(
            [[(x2 - x1) / (width - 1), 0, (x1 + x2 - width + 1) / (width - 1)],
             [0, (y2 - y1) / (height - 1), (y1 + y2 - height + 1) / (height - 1)]], dtype=x.dtype
        )  # fmt: skip
        grid = F.affine_grid(theta[None], [1, 1, size, size], align_corners=True)
        crops.append(F.grid_sample(x[int(image)][None], grid, padding_mode="zeros", align_corners=True))
    return torch.cat(crops)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_roi_crop_equals_grid_sample(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 9, 13, generator=generator, dtype=torch.float64)
    corners = torch.rand(6, 4, generator=generator, dtype=torch.float64) * 300 - 60  # some outside, some reversed
    rois = torch.cat((torch.randint(2, (6, 1), generator=generator).double(), corners), 1)
    torch.testing.assert_close(roi_crop(x, rois, 7, 16), crop_by_grid_sample(x, rois, 7, 16))


def test_roi_crop_equals_roi_align_of_a_larger_box() -> None:
    """With one sample per cell, a box 7/6 as large, moved by half a cell of the map, and zero padding at the end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 12, 15, generator=generator)
    corners = torch.tensor([[10.0, 20, 90, 100], [3, 4, 9, 11], [150, 100, 239, 191]])
    center, half = (corners[:, :2] + corners[:, 2:]) / 2, (corners[:, 2:] - corners[:, :2]) / 2 * 7 / 6
    larger = torch.cat((center - half, center + half), 1) / 16 + 0.5
    padded = F.pad(x, (0, 1, 0, 1))
    expected = torchvision_roi_align(padded, [larger], 7, 1.0, sampling_ratio=1, aligned=True)
    rois = torch.cat((torch.zeros(3, 1), corners), 1)
    torch.testing.assert_close(roi_crop(x, rois, 7, 16), expected, atol=1e-5, rtol=0)


def test_roi_crop_passes_gradcheck() -> None:
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3.0, 5, 37, 40], [0, -20, -20, 60, 70]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: roi_crop(t, rois, 3, 8), x)


def test_crop_align_takes_the_maximum_of_2x2_samples() -> None:
    """Of 14x14 samples; the first and last pixel of the image lie on the first and last cell of the map."""
    model = small_model("model.pooling=crop_align", "model.stride=16", "model.legacy_plus_one=true")
    x, images = torch.randn(1, 32, 6, 8), torch.zeros(1, 3, 90, 121)
    boxes = torch.tensor([[0, 5.0, 7, 61, 80], [0, 0, 0, 121, 90]])
    corners = boxes.clone()
    corners[:, 3:] -= 1  # the last pixel
    height, width = 90.0, 121.0
    crops = []
    for _, x1, y1, x2, y2 in corners.tolist():
        theta = torch.tensor(
            [[(x2 - x1) / (width - 1), 0, (x1 + x2 - width + 1) / (width - 1)],
             [0, (y2 - y1) / (height - 1), (y1 + y2 - height + 1) / (height - 1)]]
        )  # fmt: skip
        grid = F.affine_grid(theta[None], [1, 1, 14, 14], align_corners=True)
        crops.append(F.max_pool2d(F.grid_sample(x, grid, align_corners=True), 2))
    found = model.head._pool(x, model._pooling_rois(boxes, [x], images))  # type: ignore[operator]
    torch.testing.assert_close(found, torch.cat(crops), atol=1e-5, rtol=0)
