"""The optimiser and its learning rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refdet.recipe import TrainOptions


def optimiser(model: nn.Module, options: TrainOptions) -> torch.optim.SGD:
    """SGD with momentum; weight decay on the weights of convolutions and linear layers alone, since it would
    only push biases and the scales of norms towards nothing."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of a step, counted from 0: a linear warm-up from a tenth, then a tenth at each drop.

    The warm-up takes a fifth of the run at most, so that a run cut short by ``train.steps`` still learns.
    """
    rate, warmup = options.lr, min(options.warmup_steps, options.steps // 5)
    if step < warmup:
        rate *= 0.1 + 0.9 * step / warmup
    passed = sum(step >= drop * options.steps for drop in options.lr_drops)
    return rate * 0.1**passed


def momentum_of(model: nn.Module, sgd: torch.optim.SGD) -> dict[str, Tensor]:
    """The momentum of each parameter, by the parameter's name."""
    found = {}
    for name, parameter in model.named_parameters():
        buffer = sgd.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            found[name] = buffer
    return found


def restore_momentum(model: nn.Module, sgd: torch.optim.SGD, momentum: dict[str, Tensor]) -> None:
    """The inverse of `momentum_of`, on the device and in the layout of each parameter."""
    for name, parameter in model.named_parameters():
        if name in momentum:
            sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum[name])
