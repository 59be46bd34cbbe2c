"""Packed and fused layers of an optimized detector against the layers they replace."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from refdet.detector import packed_layers
from refdet.detector.packed_layers import (
    FusedBottleneck,
    PackedConv2d,
    PackedConvTranspose2x2,
    PackedLinear,
    conv_relu,
    pack_layers,
)
from refdet.detector.resnet import Bottleneck
from refdet.ops import convolution
from refdet.ops.convolution import has_kernels, is_half_fastest, is_pointwise_faster

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_kernels(CPU), reason="the kernels are not built, or the processor has no AVX2")
SINGLE = pytest.param(False, id="single")
HALF = pytest.param(
    True, id="half", marks=pytest.mark.skipif(not has_kernels(CPU, half=True), reason="the processor has no float16")
)
TOLERANCE = {False: 1e-4, True: 0.1}
Make = Callable[[], nn.Module]


def assert_same_output(layer: nn.Module, packed: nn.Module, x: torch.Tensor, half: bool) -> None:
    """The packed layer gives the output of the layer, in the memory layout of the networks."""
    x = (x.bfloat16() if half else x).to(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
    expected, found = layer.float()(x.float()), packed(x)
    assert found.dtype == x.dtype and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=TOLERANCE[half])


@pytest.mark.parametrize("half", [SINGLE, HALF])
@pytest.mark.parametrize(
    ("make", "supported"),
    [
        (lambda: nn.Conv2d(64, 128, 3, padding=1), True),
        (lambda: nn.Conv2d(64, 128, 3, padding=1, bias=False), True),
        (lambda: nn.Conv2d(64, 64, 1), True),
        (lambda: nn.Conv2d(64, 64, 1, stride=2, bias=False), True),
        (lambda: nn.Conv2d(64, 64, 1, padding=1), False),
        (lambda: nn.Conv2d(64, 64, 3), False),
        (lambda: nn.Conv2d(64, 64, 3, stride=2, padding=1), False),
        (lambda: nn.Conv2d(64, 64, 3, padding=2, dilation=2), False),
        (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=2), False),
        (lambda: nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), False),
        (lambda: nn.Conv2d(72, 64, 3, padding=1), False),
        (lambda: nn.Conv2d(64, 72, 1), False),
        (lambda: nn.Conv2d(32, 64, 3, padding=1), False),  # slower than PyTorch's
        (lambda: nn.Conv2d(64, 64, 3, padding=1).double(), False),
        (lambda: nn.ConvTranspose2d(64, 64, 3, padding=1), False),
        (lambda: nn.Linear(64, 64), False),
    ],
)
def test_supported_convolutions_are_packed(make: Make, supported: bool, half: bool) -> None:
    layer = make()
    if half and next(layer.parameters()).dtype == torch.float32:
        assert not PackedConv2d.supports(layer, half)  # its weights are not bfloat16
        layer = layer.bfloat16()
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        supported = supported and is_pointwise_faster(CPU, half)
    assert PackedConv2d.supports(layer, half) == supported
    if supported:
        assert not half or not PackedConv2d.supports(layer, False)
        assert_same_output(layer, PackedConv2d(layer, half), torch.randn(2, 64, 7, 9), half)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [SINGLE, HALF])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_upsampling_equals_a_transposed_convolution(half: bool, bias: bool) -> None:
    layer = nn.ConvTranspose2d(128, 64, 2, 2, bias=bias)
    layer = layer.bfloat16() if half else layer
    assert PackedConvTranspose2x2.supports(layer, half) == is_pointwise_faster(CPU, half)
    for x in (torch.randn(3, 128, 7, 7), torch.randn(1, 128, 1, 5), torch.zeros(0, 128, 7, 7)):
        assert_same_output(copy.deepcopy(layer), PackedConvTranspose2x2(layer, half), x, half)


@pytest.mark.parametrize("more", [{"stride": 1}, {"padding": 1}, {"groups": 2}, {"output_padding": 1}])
def test_other_transposed_convolutions_are_not_packed(more: dict[str, int]) -> None:
    assert not PackedConvTranspose2x2.supports(nn.ConvTranspose2d(64, 64, 2, **{"stride": 2, **more}))  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [HALF])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_layers_in_half(half: bool, bias: bool) -> None:
    layer = nn.Linear(192, 128, bias=bias).bfloat16()
    assert (
        PackedLinear.supports(layer, half)
        and not PackedLinear.supports(layer)
        and not PackedLinear.supports(layer.float())
    )
    for rows in (5, 0):
        assert_same_output(layer, PackedLinear(layer, half), torch.randn(rows, 192), half)


def folded_bottleneck(stride: int, in_1x1: bool) -> Bottleneck:
    torch.manual_seed(0)
    block = Bottleneck(64, 64, stride, lambda _: nn.Identity(), in_1x1)
    return block.eval().requires_grad_(False)


@pytest.mark.parametrize("half", [SINGLE, HALF])
@pytest.mark.parametrize(("stride", "in_1x1"), [(1, False), (2, True), (2, False)])
@torch.inference_mode()
def test_a_packed_bottleneck_gives_the_same_output(half: bool, stride: int, in_1x1: bool) -> None:
    block = folded_bottleneck(stride, in_1x1)
    fused = FusedBottleneck(copy.deepcopy(block))
    x = torch.randn(2, 64, 12, 14).to(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), block(x), rtol=0, atol=1e-5)  # without packed layers
    if half:
        fused.to(torch.bfloat16)
    pack_layers(fused, half)
    packed = [isinstance(layer, PackedConv2d) for layer in (fused.conv1, fused.conv2, fused.conv3, fused.downsample[0])]
    pointwise = is_pointwise_faster(CPU, half)
    assert packed == [
        pointwise,
        in_1x1 or stride == 1,
        pointwise,
        pointwise,
    ]  # a 3x3 convolution with a stride is left to PyTorch
    found = fused(x.bfloat16() if half else x)
    torch.testing.assert_close(found.float(), block(x), rtol=0, atol=TOLERANCE[half])


def test_a_bottleneck_with_norms_is_refused() -> None:
    with pytest.raises(TypeError, match="folded"):
        FusedBottleneck(Bottleneck(64, 64, 1, nn.BatchNorm2d, False))


@pytest.mark.parametrize("kernel", [1, 3])
@torch.inference_mode()
def test_shortcut_and_relu_after_plain_and_packed_convolutions(kernel: int) -> None:
    layer = nn.Conv2d(64, 64, kernel, padding=kernel // 2)
    x, shortcut = torch.randn(2, 64, 5, 6), torch.randn(2, 64, 5, 6)
    before = shortcut.clone()
    packed, alone, expected = PackedConv2d(layer), layer(x), layer(x) + shortcut
    torch.testing.assert_close(packed(x, shortcut), expected, rtol=0, atol=1e-4)
    for one in (layer, packed):
        torch.testing.assert_close(conv_relu(one, x), alone.relu(), rtol=0, atol=1e-4)
        torch.testing.assert_close(conv_relu(one, x, shortcut), expected.relu(), rtol=0, atol=1e-4)
        assert torch.equal(shortcut, before)


def test_pack_layers_skips_the_layers_to_keep() -> None:
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2)))
    model[1] = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2)))
    pack_layers(model, False, frozenset((model[1][1],)))
    assert [type(layer) for layer in (model[0], *model[1])] == [PackedConv2d, PackedConv2d, nn.Conv2d]


def test_without_the_kernels_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "DEVICES", frozenset())
    for half in (False, True):
        for layer in (nn.Conv2d(64, 64, 1), nn.ConvTranspose2d(64, 64, 2, 2), nn.Linear(64, 64)):
            layer = layer.bfloat16() if half else layer
            kinds = (packed_layers.PackedConv2d, packed_layers.PackedConvTranspose2x2, packed_layers.PackedLinear)
            assert not any(kind.supports(layer, half) for kind in kinds)
    assert not is_half_fastest(CPU)
