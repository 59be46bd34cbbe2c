"""Batch norm with the statistics of the images of all training processes.

Shape shorthand in this module:

    N: images or RoIs of this process, 0 or more
    C: channels
    H, W: height and width of the map
    R: processes
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_DIMS = (0, 2, 3)  # all but the channels


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are over the images of all processes, for CPUs.

    PyTorch's SyncBatchNorm needs a GPU. Unlike BatchNorm2d, it must have a weight, a bias and a momentum: with the
    momentum None, its running statistics would never change.

    Attributes:
        group: process group of the processes; None for the default group.
    """

    group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, H, W); the result has the dtype of x."""
        if not self.training:
            return super().forward(x)
        # in float32, as in BatchNorm2d: bfloat16 cannot hold the number of values, nor the mean of many
        wide = x.float() if x.dtype == torch.bfloat16 else x
        y, mean, variance, count = _BatchNormFunction.apply(wide, self.weight, self.bias, self.eps, self.group)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum or 0.0)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        return y.to(x.dtype)


class _BatchNormFunction(torch.autograd.Function):
    """Normalize with the mean and variance over all processes, merged from those of each (Chan et al., 1979)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y (N, C, H, W), the mean (C,), the biased variance (C,) and the number of values per channel ()."""
        channels, local_count = x.shape[1], x.numel() // x.shape[1]
        mean = x.sum(_DIMS) / max(local_count, 1)
        squared_deviations = (x - mean[:, None, None]).square().sum(_DIMS)
        packed = torch.cat((mean, squared_deviations, mean.new_tensor([local_count])))
        gathered = packed.new_empty(dist.get_world_size(group), len(packed))  # (R, 2C + 1)
        dist.all_gather(list(gathered.unbind()), packed, group=group)
        means, counts = gathered[:, :channels], gathered[:, -1:]  # (R, C), (R, 1)
        count = counts.sum().clamp(min=1)
        mean = (means * counts).sum(0) / count
        variance = (gathered[:, channels:-1] + counts * (means - mean).square()).sum(0) / count
        scale = (variance + eps).rsqrt()
        normalized = (x - mean[:, None, None]) * scale[:, None, None]
        ctx.save_for_backward(normalized, weight, scale, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return normalized * weight[:, None, None] + bias[:, None, None], mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of x, weight and bias; those of weight and bias are of this process, as `distributed` sums them."""
        normalized, weight, scale, count = ctx.saved_tensors
        grad_bias, grad_weight = grad_output.sum(_DIMS), (grad_output * normalized).sum(_DIMS)
        means = torch.cat((grad_bias, grad_weight)) / count
        dist.all_reduce(means, group=ctx.group)
        mean_grad, mean_product = means.chunk(2)  # over all processes, of grad_output and of it times normalized
        grad_input = grad_output - mean_grad[:, None, None] - normalized * mean_product[:, None, None]
        return grad_input * (weight * scale)[:, None, None], grad_weight, grad_bias, None, None


def convert_sync_batchnorm(model: nn.Module, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Replace each BatchNorm2d of a model by a norm over all processes, with the same parameters and buffers.

    Uses PyTorch's SyncBatchNorm on a GPU and `SyncedBatchNorm` elsewhere.

    Args:
        model: the model, changed in place.
        device: device of the model.
        group: process group of the processes; None for the default group.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:  # not a subclass, such as SyncedBatchNorm
                synced = SyncedBatchNorm(child.num_features, child.eps, child.momentum)
                synced.group = group
                synced._parameters, synced._buffers = child._parameters, child._buffers
                setattr(module, name, synced.train(child.training))
