"""Frozen norms that training folds into convolutions, against a convolution followed by a norm."""

from __future__ import annotations

import copy

import pytest
import torch
from detector_examples import VARIANTS, small_model
from host_waits import InAten
from torch import nn

from refdet.detector import resnet
from refdet.detector.resnet import FrozenBatchNorm, ResNet, conv_norm


def random_frozen_norm(channels: int) -> FrozenBatchNorm:
    norm = FrozenBatchNorm(channels)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    return norm


def conv_then_norm(convolution: nn.Module, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(convolution(x))


def gradients(network: ResNet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    sum((m.square().mean() for m in network(images, 4)), torch.zeros(())).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("depth", "dilation"), [(18, 1), (50, 1), (50, 2)])
@pytest.mark.parametrize("caffe", [False, True])
def test_maps_and_gradients_equal_those_of_convolution_then_norm(
    depth: int, dilation: int, caffe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    strides = (1, 2, 2, 1 if dilation > 1 else 2)
    network = ResNet(depth, 8, random_frozen_norm, strides, caffe, dilation=dilation).double()
    for part in (network.conv1, network.layer1):
        part.requires_grad_(False)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    maps, found = network(images, 4), gradients(network, images)
    with monkeypatch.context() as patch:
        patch.setattr(resnet, "conv_norm", conv_then_norm)
        expected_maps, expected = network(images, 4), gradients(network, images)
    torch.testing.assert_close(maps, expected_maps, rtol=1e-10, atol=1e-10)
    assert found.keys() == expected.keys() and not any(name.startswith(("conv1", "layer1")) for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10 * gradient.abs().max().item())
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


@pytest.mark.parametrize("trained", [False, True])
def test_the_cache_of_folded_weights_follows_changes(trained: bool) -> None:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(trained), random_frozen_norm(4)
    x = torch.randn(1, 3, 8, 8)

    def check() -> None:
        torch.testing.assert_close(conv_norm(convolution, norm, x), norm(convolution(x)), rtol=1e-4, atol=1e-5)

    check()
    with torch.no_grad():
        convolution.weight.mul_(3)
    check()
    norm.load_state_dict({name: value + 1 for name, value in norm.state_dict().items()})
    check()
    norm.running_var.mul_(4)
    check()
    convolution.requires_grad_(not trained)
    check()
    convolution, norm, x = convolution.double(), norm.double(), x.double()
    check()
    other = copy.deepcopy(norm)
    other.bias.add_(1)
    check()


def test_frozen_weights_are_folded_once_and_trained_weights_every_time() -> None:
    torch.manual_seed(0)
    weight, norm = torch.randn(4, 3, 1, 1), random_frozen_norm(4)
    half, bias = norm.fold(weight, torch.bfloat16)
    assert norm.fold(weight, torch.bfloat16)[0] is half and bias.dtype == torch.float32
    whole, _ = norm.fold(weight)
    assert torch.equal(whole.bfloat16(), half) and whole.dtype == torch.float32
    weight.mul_(2)
    assert torch.equal(norm.fold(weight, torch.bfloat16)[0], half * 2)
    weight.requires_grad_()
    trained = norm.fold(weight, torch.bfloat16)[0]
    assert torch.equal(trained, half * 2) and trained.requires_grad


def test_folded_weights_are_not_in_the_state_dict() -> None:
    norm = random_frozen_norm(4)
    norm.fold(torch.ones(4, 3, 1, 1))
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert not list(norm.parameters())


def test_training_computes_no_norms() -> None:
    model = small_model(*VARIANTS["frozen"], "model.masks=false").train()
    images = torch.randn(2, 3, 96, 128)
    counts = []
    for _ in range(2):
        with InAten() as aten:
            sum(m.sum() for m in model.extract_feature_maps(images)).backward()
        counts.append(aten.calls)
    assert counts[1]["convolution"] > 0 and not any("batch_norm" in name for name in counts[1])
    assert counts[1]["rsqrt"] == 0 < counts[0]["rsqrt"]  # scales and shifts are computed in the first step only
