"""Batch norm over processes computes what BatchNorm2d does; for bfloat16 inputs both compute in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from refdet.training.sync_norm import convert_sync_batchnorm


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup | None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_computes_the_same_as_batch_norm(group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, synced = (nn.Sequential(nn.BatchNorm2d(8)) for _ in range(2))
    convert_sync_batchnorm(synced, torch.device("cpu"), group)
    if dtype == torch.float64:
        plain, synced = plain.double(), synced.double()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for _ in range(3):
        x = (torch.randn(3, 8, 37, 41) * 3 + 20).to(dtype)  # too many and too large for sums in bfloat16
        outputs, gradients = [], []
        for norm in (plain, synced):
            norm.zero_grad()
            inputs = x.clone().requires_grad_()
            outputs.append(norm(inputs))
            (outputs[-1].float() * torch.linspace(-1, 1, 41)).sum().backward()
            gradients.append((inputs.grad, norm[0].weight.grad, norm[0].bias.grad))
        assert outputs[0].dtype == outputs[1].dtype == dtype
        output_tolerance = 0.02 if dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(outputs[1], outputs[0], atol=output_tolerance, rtol=output_tolerance)
        for ours, theirs in zip(gradients[1], gradients[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=max(output_tolerance, 1e-3), rtol=output_tolerance)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(synced[0], name), getattr(plain[0], name), atol=tolerance, rtol=tolerance)
