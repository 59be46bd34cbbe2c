import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align as reference

from refdet.ops.pooling import roi_align


def some_rois(seed: int, count: int) -> torch.Tensor:
    """Boxes in, across and outside an image of 96x128."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 160 - 40
    size = torch.rand(count, 2, generator=random) ** 3 * 120
    image = torch.randint(0, 2, (count, 1), generator=random)
    return torch.cat((image, corner, corner + size), dim=1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(0, 9), st.sampled_from([4, 8, 32, 128]), st.sampled_from([1, 7, 14]))
def test_pooling_is_torchvisions(seed: int, count: int, stride: int, size: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 5, max(96 // stride, 1), max(128 // stride, 1), dtype=torch.float64, requires_grad=True)
    rois = some_rois(seed, count).double()
    found = roi_align(x, rois, size, stride)
    expected = reference(x, rois, size, 1 / stride, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(found, expected)
    if count:
        weight = torch.randn_like(found)
        torch.testing.assert_close(
            torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((expected * weight).sum(), x)
        )


def test_gradients_are_right() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 30, 25], [1, -9, -9, 12, 40]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: roi_align(t, rois, 3, 8), x)


def test_type_and_layout() -> None:
    x = torch.randn(1, 8, 6, 6).bfloat16()
    found = roi_align(x, torch.tensor([[0, 0.0, 0, 48, 48]]), 7, 8)
    assert found.dtype == torch.bfloat16 and found.shape == (1, 8, 7, 7)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_map_does_not_matter(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 12, 16)
    rois = some_rois(1, 6)
    torch.testing.assert_close(roi_align(x.contiguous(memory_format=layout), rois, 7, 8), roi_align(x, rois, 7, 8))
