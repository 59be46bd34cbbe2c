"""Training with bias, shortcut and ReLU in one fused pass, as on a GPU, against separate operators."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from detector_examples import VARIANTS, small_model
from devices import is_gpu
from torch import Tensor, nn

from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.resnet import BasicBlock, Bottleneck, FrozenBatchNorm, Norm, conv_norm_relu
from refdet.device import float32_arithmetic, resolve_device
from refdet.ops import training_epilogue
from refdet.ops.training_epilogue import _BiasRelu

FROZEN = {
    name: [*VARIANTS[name], "model.norm=frozen"]
    for name in ("c4", "c4-bottleneck", "fpn", "seed", "detectron2-c4", "dc5", "vgg16")
}
ON_DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(kernels=True))])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Collects the shapes of inputs of the fused pass."""
    shapes: list[tuple[int, ...]] = []
    apply = _BiasRelu.apply

    def spy(x: Tensor, *others: Tensor | None) -> Tensor:
        shapes.append(tuple(x.shape))
        return apply(x, *others)

    monkeypatch.setattr(_BiasRelu, "apply", spy)
    return shapes


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda on: monkeypatch.setattr(training_epilogue, "FUSED", frozenset(("cpu", "cuda") if on else ()))


def random_frozen_norm(channels: int) -> FrozenBatchNorm:
    norm = FrozenBatchNorm(channels)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    return norm


def output_and_gradients(block: nn.Module, x: Tensor, bf16: bool) -> list[Tensor]:
    """The output, and the gradients of the input and the weights."""
    x = x.detach().requires_grad_()
    with float32_arithmetic("float32"):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            y = block(x.bfloat16() if bf16 else x)  # the dtype that the previous layer returns under autocast
        loss = y.float().square().mean()
        return [y.detach().float(), *torch.autograd.grad(loss, [x, *block.parameters()])]


@ON_DEVICES
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (64, 1), (64, 2)])
def test_a_fused_block_equals_separate_operators(
    device: str,
    bf16: bool,
    kind: type[nn.Module],
    channels: int,
    stride: int,
    fuse: Callable[[bool], None],
    calls: list[tuple[int, ...]],
) -> None:
    torch.manual_seed(0)
    where, inputs = resolve_device(device), channels * kind.expansion if stride == 1 else 24
    block = kind(inputs, channels, stride, random_frozen_norm, False).to(where, memory_format=torch.channels_last)
    x = torch.randn(4, inputs, 14, 15).to(where, memory_format=torch.channels_last)
    fuse(False)
    expected, exact = output_and_gradients(block, x, bf16), output_and_gradients(block, x, False)
    assert not calls
    fuse(True)
    found = output_and_gradients(block, x, bf16)
    assert len(calls) == (2 if kind is BasicBlock else 3)
    for one, other, best in zip(found, expected, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        # on a CPU, the separate operators round less often: oneDNN adds the bias before it rounds to bfloat16
        limit = 2 * float((other - best).norm()) if bf16 else 1e-5 * float(best.norm())
        assert float((one - best).norm()) <= limit


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.Identity()])
def test_blocks_with_other_norms_are_not_fused(
    norm: Norm, fuse: Callable[[bool], None], calls: list[tuple[int, ...]]
) -> None:
    block = Bottleneck(16, 8, 1, norm, False)
    others = copy.deepcopy(block)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    fuse(False)
    expected = output_and_gradients(others, x, False)
    fuse(True)
    for one, other in zip(output_and_gradients(block, x, False), expected, strict=True):
        assert torch.equal(one, other)
    assert not calls


@pytest.mark.parametrize("trained", [False, True])
def test_the_stem_is_pooled_before_the_fused_pass(
    trained: bool, fuse: Callable[[bool], None], calls: list[tuple[int, ...]]
) -> None:
    """The pass gets the 7x7 positions that pooling leaves of 13x13."""
    torch.manual_seed(0)
    convolution, norm, pool = (
        nn.Conv2d(3, 8, 7, 2, padding=3, bias=False),
        random_frozen_norm(8),
        nn.MaxPool2d(3, 2, padding=1),
    )
    convolution.requires_grad_(trained)
    images = torch.randn(2, 3, 26, 26).contiguous(memory_format=torch.channels_last)
    images[0, 0, 3, 3] = torch.nan
    found = []
    for on in (False, True):
        fuse(on)
        y = conv_norm_relu(convolution, norm, images, pool)
        gradient = torch.autograd.grad(y[1].square().sum(), convolution.weight) if trained else ()
        found.append((y.detach(), *gradient))
    assert calls == [(2, 8, 7, 7)] and found[0][0].isnan().any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-5)


def outputs_and_gradients(model: MaskRCNN, device: str, bf16: bool) -> list[Tensor]:
    """Outputs of all parts of the network, and the gradients of all parameters."""
    torch.manual_seed(0)  # for dropout
    model.zero_grad()
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0)).to(device)
    rois = torch.tensor([[0, 5.0, 5, 60, 60], [1, 10, 20, 90, 80], [0, 0, 0, 127, 95]], device=device)
    with float32_arithmetic("float32"):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            maps = model.extract_feature_maps(images.contiguous(memory_format=torch.channels_last))
            output, features = model.rpn(maps), model.head.features(maps, rois)
            outputs = [*maps, output.logits, output.deltas, *model.head.predict_boxes(features.fc7)]
            if model.recipe.model.masks:
                outputs.append(model.head.mask_logits(maps, rois, features, torch.tensor([1, 3, 2], device=device)))
        outputs = [y.float() / y.detach().float().abs().mean().clamp(min=1e-6) for y in outputs]
        sum((y.square().mean() for y in outputs), torch.zeros((), device=device)).backward()
    return [*(y.detach() for y in outputs), *(p.grad for p in model.parameters() if p.grad is not None)]


@ON_DEVICES
@pytest.mark.parametrize("variant", FROZEN)
def test_a_fused_detector_equals_separate_operators(
    device: str, variant: str, fuse: Callable[[bool], None], calls: list[tuple[int, ...]]
) -> None:
    model = small_model(*FROZEN[variant], "model.zero_init_residual=false").train()
    for name, norm in model.named_modules():
        if isinstance(norm, FrozenBatchNorm):
            norm.weight.fill_(
                0.3 if name.endswith("bn3") else 1.0
            )  # smaller, so that activations do not grow from block to block
            norm.bias.uniform_(-0.1, 0.1)
    model.to(resolve_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse(False)
    expected = outputs_and_gradients(model, device, False)
    assert not calls
    fuse(True)
    for one, other in zip(outputs_and_gradients(model, device, False), expected, strict=True):
        assert float((one - other).norm()) <= (1e-3 if is_gpu(device) else 1e-4) * float(other.norm())
    assert len(calls) >= 10
    count = len(calls)
    found, rough = outputs_and_gradients(model, device, True), outputs_and_gradients(model, device, True)
    assert len(calls) == 3 * count and all(value.isfinite().all() for value in found)
    assert is_gpu(device) or all(torch.equal(one, other) for one, other in zip(found, rough, strict=True))
