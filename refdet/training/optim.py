"""The optimizer and the learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from refdet.config.recipe import TrainOptions


class GuardedSGD(torch.optim.SGD):
    """PyTorch's fused SGD, whose steps change nothing from the first loss or gradient on that is not finite.

    This is decided on the device, without waiting for the losses: when the losses are read, a step late, the parameters
    and their momentum are still those before the first bad step.

    Attributes:
        found_inf: scalar float32, 1 from the first bad step on; PyTorch's fused kernel reads this attribute.
    """

    found_inf: Tensor

    def guard(self, values: Tensor) -> None:
        """Make this and all later steps change nothing if any of the values is not finite."""
        bad = values.isfinite().logical_not().any().float()
        self.found_inf = torch.maximum(self.found_inf, bad)


def build_optimizer(model: nn.Module, options: TrainOptions, new_prefixes: tuple[str, ...] | None = None) -> GuardedSGD:
    """Make SGD with momentum; weight decay only for weights of linear layers and of convolutions with several inputs.

    So norms, biases and depthwise convolutions do not decay.

    Args:
        model: the network; frozen parameters are left out.
        options: learning rate, momentum and weight decay.
        new_prefixes: prefixes of the parameters that pretrained weights did not have; the other parameters have
            ``options.pretrained_lr_mult`` times the learning rate. None without pretrained weights.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by weight decay and learning rate multiplier
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = options.weight_decay if parameter.ndim > 1 and parameter.shape[1] > 1 else 0.0
            lr_mult = 1.0 if new_prefixes is None or name.startswith(new_prefixes) else options.pretrained_lr_mult
            lr_mult *= options.bias_lr_mult if name.endswith("bias") else 1.0
            groups.setdefault((decay, lr_mult), []).append(parameter)
    sgd = GuardedSGD(
        [
            {"params": parameters, "weight_decay": decay, "lr_mult": lr_mult}
            for (decay, lr_mult), parameters in groups.items()
        ],
        lr=options.lr,
        momentum=options.momentum,
        fused=True,
    )
    trained = [parameter for parameters in groups.values() for parameter in parameters]
    sgd.found_inf = torch.zeros((), dtype=torch.float32, device=trained[0].device)
    if options.momentum:
        for parameter in trained:  # the fused kernel needs a buffer for all parameters or for none
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_lr(sgd: torch.optim.SGD, lr: float) -> None:
    """Set the learning rate of each parameter group of `build_optimizer`."""
    for group in sgd.param_groups:
        group["lr"] = lr * group["lr_mult"]


def learning_rate(step: int, options: TrainOptions) -> float:
    """Learning rate of a step, counted from 0: linear warm-up from a tenth, times the factor of ``train.schedule``.

    For "step", the factor is multiplied by 0.1 at each milestone. For "cosine", it falls from 1 to 0 over the run, like
    half a period of a cosine. The warm-up takes at most a fifth of the run, so that short runs learn too.
    """
    lr, warmup = options.lr, min(options.warmup_steps, options.steps // 5)
    if step < warmup:
        lr *= 0.1 + 0.9 * step / warmup
    if options.schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * step / options.steps))
    passed = sum(step >= milestone * options.steps for milestone in options.lr_milestones)
    return lr * 0.1**passed


def momentum_of(model: nn.Module, sgd: torch.optim.SGD) -> dict[str, Tensor]:
    """Parameter name -> momentum buffer, for the parameters that have one."""
    buffers = {}
    for name, parameter in model.named_parameters():
        buffer = sgd.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            buffers[name] = buffer
    return buffers


def restore_momentum(model: nn.Module, sgd: torch.optim.SGD, momentum: dict[str, Tensor]) -> None:
    """Copy momentum buffers, as returned by `momentum_of`, into an optimizer.

    The copies get the device and memory format of their parameters; parameters without a buffer keep theirs.
    """
    for name, parameter in model.named_parameters():
        if name in momentum:
            sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum[name])
