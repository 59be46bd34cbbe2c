"""Exponential moving average of the weights during training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average, over the steps, of a network's parameters and the running statistics of its norms.

    Each step replaces the average by decay * average + (1 - decay) * current values. In the first steps the decay is
    lower, ``(1 + step) / (10 + step)``, so that the random initial weights are soon forgotten. Integers, such as the
    batch counters of norms, are not averaged but copied.

    Args:
        model: the network; the average starts from its weights.
        decay: decay after the first steps, in 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> Mapping[str, Tensor]:
        """Name -> average, on the device of the network."""
        return self._tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self._tensors.items():
            value.copy_(tensors[name])

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average after a step, counted from 1; does not synchronize with the device."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, values = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(self._tensors[name])
                values.append(value)
            else:
                self._tensors[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)
