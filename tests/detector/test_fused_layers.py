"""Fused layers for GPUs: they equal plain PyTorch on the CPU, and launch fewer operators on a (fake) GPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fake_gpu import fake_image, on_fake_gpu
from torch import Tensor, nn
from trained_models import IDS, VARIANTS, some_images, trained_model

from refdet.detector import fused_layers, optimize
from refdet.detector.fused_layers import FusedConv2d, FusedStem
from refdet.detector.packed_layers import FusedBottleneck, conv_relu
from refdet.detector.predictor import describe_boxes, detect_batch
from refdet.detector.res5_head import SplitRes5
from refdet.detector.resnet import Bottleneck
from refdet.device import exact_float32
from refdet.ops import epilogue as epilogues
from refdet.ops.epilogue import Epilogue, best_epilogue, bias_relu
from refdet.structures.detection_options import DetectionOptions

EPILOGUES = pytest.mark.parametrize("epilogue", [Epilogue.KERNEL, Epilogue.LIBRARY, Epilogue.PRODUCTS])


def bottleneck(stride: int, channels: int = 64) -> nn.Module:
    """A bottleneck with folded norms; with stride 2 it has a convolution in its shortcut."""
    block = Bottleneck(channels * (1 if stride == 2 else 4), channels, stride, nn.BatchNorm2d, False).eval()
    folded = nn.Sequential(block)
    optimize.fuse_conv_bn(folded)
    return FusedBottleneck(block)


def fuse(block: nn.Module, epilogue: Epilogue, dtype: torch.dtype) -> nn.Module:
    """A copy of a block with fused layers."""
    whole = nn.Sequential(copy.deepcopy(block)).to(dtype)
    optimize.fuse_blocks(whole, epilogue)
    return whole


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CUDA kernels are built; the fake GPU calls none."""
    monkeypatch.setattr(epilogues, "DEVICES", frozenset(("cpu", "cuda")))


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize(
    ("epilogue", "dtype", "stride", "expected"),
    [
        (Epilogue.PLAIN, torch.bfloat16, 1, {"convolution": 3, "bias": 3, "relu_": 3, "add_": 1}),
        (Epilogue.KERNEL, torch.float32, 1, {"convolution": 3, "bias_relu": 3}),
        (Epilogue.LIBRARY, torch.bfloat16, 1,
         {"_addmm_activation": 1, "convolution": 1, "bias_relu": 1, "cudnn_convolution_add_relu": 1}),
        (Epilogue.PRODUCTS, torch.bfloat16, 1, {"_addmm_activation": 1, "convolution": 1, "mm": 1, "bias_relu": 2}),
        (Epilogue.PLAIN, torch.bfloat16, 2, {"convolution": 4, "bias": 4, "relu_": 3, "add_": 1}),
        (Epilogue.KERNEL, torch.float32, 2, {"convolution": 4, "bias_relu": 3}),
        (Epilogue.LIBRARY, torch.bfloat16, 2,
         {"_addmm_activation": 1, "convolution": 2, "bias_relu": 1, "cudnn_convolution_add_relu": 1}),
    ],
)  # fmt: skip
def test_launches_of_a_bottleneck(
    epilogue: Epilogue, dtype: torch.dtype, stride: int, expected: dict[str, int]
) -> None:
    block = bottleneck(stride)
    module = block.to(dtype) if epilogue is Epilogue.PLAIN else fuse(block, epilogue, dtype)
    with on_fake_gpu(module) as launched:
        y = module(fake_image((2, 64 if stride == 2 else 256, 20, 30), dtype))
    assert +launched.calls == expected
    assert y.shape == (2, 256, 20 // stride, 30 // stride) and y.dtype == dtype and y.device.type == "cuda"


@EPILOGUES
@pytest.mark.parametrize("stride", [1, 2])
def test_a_fused_bottleneck_gives_the_same_output(epilogue: Epilogue, stride: int) -> None:
    torch.manual_seed(0)
    block = bottleneck(stride, 8).requires_grad_(False)
    for convolution in block.modules():
        if isinstance(convolution, nn.Conv2d) and convolution.bias is not None:
            convolution.bias.uniform_(-1, 1)
    x = torch.randn(2, 8 if stride == 2 else 32, 9, 11).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(fuse(block, epilogue, torch.float32)(x), block(x), rtol=1e-5, atol=1e-5)


@EPILOGUES
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_detector_finds_the_same_regions(epilogue: Epilogue, variant: str) -> None:
    model = trained_model(*VARIANTS[variant][0])
    fast = optimize.optimize_for_inference(copy.deepcopy(model), epilogue=epilogue)
    kinds = {type(part) for part in fast.modules()}
    assert FusedConv2d in kinds and (FusedStem in kinds) == (model.recipe.model.backbone == "resnet")
    images, records = some_images()
    options = DetectionOptions(score_threshold=0.1, max_regions=30)
    expected = detect_batch(model, images, records, IDS, options)
    for a, b in zip(expected, detect_batch(fast, images, records, IDS, options), strict=True):
        np.testing.assert_array_equal(a.category_ids, b.category_ids)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)
    boxes = [r.boxes for r in expected]
    found = describe_boxes(fast, images, boxes)
    for exact, other in zip(describe_boxes(model, images, boxes), found, strict=True):
        for name, values in exact.features.items():
            np.testing.assert_allclose(other.features[name], values, rtol=1e-4, atol=1e-5)


def test_a_shortcut_within_another_tensor_is_not_copied_for_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "conv_add_relu", None)  # calling it would fail
    layer = FusedConv2d(nn.Conv2d(8, 16, 1), Epilogue.LIBRARY)
    wide = torch.randn(2, 24, 5, 5).contiguous(memory_format=torch.channels_last)
    x, shortcut = wide.split((8, 16), dim=1)
    with torch.inference_mode():
        exact = torch.relu(nn.functional.conv2d(x, layer.weight, layer.bias) + shortcut)
        torch.testing.assert_close(layer(x, shortcut, apply_relu=True), exact)


@pytest.mark.parametrize(
    ("error", "falls_back"),
    [(RuntimeError("GET was unable to find an engine to execute this computation"), True),
     (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), True),
     (RuntimeError("CUDA error: an illegal memory access"), False),
     (torch.OutOfMemoryError("engine"), False)],
)  # fmt: skip
def test_a_convolution_that_cudnn_cannot_fuse_falls_back_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, falls_back: bool
) -> None:
    def refuse(*given: object) -> Tensor:
        raise error

    monkeypatch.setattr(fused_layers, "conv_add_relu", refuse)
    layer, x = FusedConv2d(nn.Conv2d(8, 8, 1), Epilogue.LIBRARY), torch.randn(2, 8, 5, 5)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        if not falls_back:
            with pytest.raises(type(error), match=str(error)):
                layer(x, x, apply_relu=True)
            return
        torch.testing.assert_close(layer(x, x, apply_relu=True), torch.relu(layer(x) + x))
    assert layer.epilogue is Epilogue.KERNEL and "cuDNN cannot fuse the convolution" in caplog.text


def test_unsupported_convolutions_are_not_fused() -> None:
    for layer in (
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.ConvTranspose2d(8, 8, 3),
    ):
        assert not FusedConv2d.supports(layer)
    assert FusedConv2d.supports(nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False))


def test_the_best_epilogue_depends_on_device_dtype_and_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert best_epilogue(torch.device("cpu"), torch.bfloat16) is Epilogue.PLAIN
    for kernels, rest in ((("cpu", "cuda"), Epilogue.KERNEL), (("cpu",), Epilogue.PLAIN)):
        monkeypatch.setattr(epilogues, "DEVICES", frozenset(kernels))
        assert best_epilogue(gpu, torch.float32) is rest
        for works in (True, False):
            monkeypatch.setattr(epilogues, "_cudnn_fuses_shortcut", lambda *_, works=works: works)
            assert best_epilogue(gpu, torch.bfloat16) is (Epilogue.LIBRARY if works else rest)


@pytest.mark.parametrize("wide", [False, True])
def test_bias_relu_keeps_nan_and_writes_only_its_channels(wide: bool) -> None:
    whole = torch.randn(2, 12, 3, 5).contiguous(memory_format=torch.channels_last)
    whole[0, 1, 0, 0] = torch.nan
    x, before, bias = whole[:, :8] if wide else whole, whole.clone(), torch.randn(12)[: 8 if wide else 12]
    exact = torch.relu(x + bias[:, None, None])
    y = bias_relu(x, bias)
    torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if wide:
        torch.testing.assert_close(whole, before, rtol=0, atol=0, equal_nan=True)


def test_a_network_on_the_cpu_is_not_changed() -> None:
    fast = optimize.optimize_for_inference(trained_model())
    assert not any(isinstance(part, FusedConv2d | FusedStem) for part in fast.modules())
    conv5 = fast.get_submodule("head.conv5")
    assert isinstance(conv5, SplitRes5) and conv5.reduce_bias_float32 is None


@pytest.mark.gpu(kernels=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (1, 6, 5, 5), (3, 2048, 7, 7), (2, 300, 1, 1), (0, 8, 3, 3)])
def test_cuda_bias_relu_equals_plain_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images, channels, *sides = shape
    wide = torch.randn(images, channels + 8, *sides).to("cuda", dtype).contiguous(memory_format=torch.channels_last)
    x, shortcut = wide[:, :channels].clone(memory_format=torch.channels_last), wide[:, 8:]
    bias = torch.randn(channels, device="cuda")
    for given, added in ((x, None), (x, shortcut), (wide[:, :channels], shortcut)):
        exact = epilogues.bias_relu_plain(given, bias, added, torch.empty_like(given))
        torch.testing.assert_close(bias_relu(given.clone(), bias, added), exact, rtol=0, atol=0)


@pytest.mark.gpu(kernels=True)
@EPILOGUES
@pytest.mark.parametrize("stride", [1, 2])
def test_cuda_fused_bottleneck_equals_plain_pytorch(epilogue: Epilogue, stride: int) -> None:
    torch.manual_seed(0)
    block = bottleneck(stride).cuda()
    x = torch.randn(2, 64 if stride == 2 else 256, 20, 30, device="cuda").contiguous(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if epilogue is Epilogue.LIBRARY else torch.float32
    close = {"rtol": 2e-2, "atol": 5e-2} if epilogue is Epilogue.LIBRARY else {"rtol": 1e-5, "atol": 1e-5}
    with torch.inference_mode(), exact_float32():  # by default, convolutions are in TF32 and matrix products are not
        y = fuse(block, epilogue, dtype).to(memory_format=torch.channels_last)(x.to(dtype))
        torch.testing.assert_close(y.float(), block(x), **close)


def test_conv_relu_accepts_fused_and_plain_convolutions() -> None:
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(conv_relu(FusedConv2d(layer, Epilogue.KERNEL), x), conv_relu(layer, x))
