"""The forward and backward passes of a step: of a part of its images at a time, and of this process's share of them.

The losses of a step are divided by counts of samples of all its images, so they must be known before the first
gradient is computed. With several passes all but the first are therefore begun twice: once up to the samples, to count
them, and once for the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refdet.data.training_batches import Batch
from refdet.detector.loss_counts import LossCounts, Total
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.sampling import image_seeds
from refdet.device import usable_precision
from refdet.training.processes import Processes


class LossNetwork(nn.Module):
    """A network with `compute_losses` as its forward, which DistributedDataParallel needs."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: object) -> dict[str, Tensor]:
        """The loss terms; see `MaskRCNN.compute_losses`."""
        return self.model.compute_losses(*given)  # type: ignore[arg-type]


class Passes:
    """Computes the gradients of steps.

    Args:
        model: the network, in training mode.
        processes: which have a share of the images each.
        momentum: of the optimizer, which all processes begin with.
    """

    def __init__(
        self, model: MaskRCNN, processes: Processes | None = None, momentum: list[Tensor] | None = None
    ) -> None:
        options = model.recipe.train
        self.model, self.processes, self._passes = model, processes or Processes(), options.accumulate
        self._before = self.processes.rank * (options.batch_size // self.processes.world_size)
        # on a GPU a step that was begun cannot be left
        on_cpu = not next(model.parameters()).is_cuda
        self._keeps_statistics = on_cpu and self.processes.world_size > 1 and model.recipe.model.norm == "batch"
        self._statistics: list[Tensor] = []
        self._network = self.processes.wrap(LossNetwork(model), momentum or [])

    def backward(self, batch: Batch, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Compute the gradients of a step.

        Args:
            batch: the images of this process.
            generator: on the CPU, seeded for this step.

        Returns:
            Names of the loss terms, and their values over all images of all processes.
        """
        if self._keeps_statistics:
            self._statistics = [buffer.clone() for buffer in self.model.buffers()]
        if self._before:
            image_seeds(self._before, 2, generator)  # of the processes before this one
        parts = batch.parts(self._passes)
        total = self._total(parts, generator)
        names: list[str] = []
        found: list[Tensor] = []
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.processes.without_sync(self._network):
                losses = self._of(self._network, part, generator, total)
                values = torch.stack(list(losses.values()))
                values.sum().backward()
            names = list(losses)
            found.append(values.detach())
        terms = sum(found[1:], start=found[0])
        self.processes.sum_(terms)
        return names, terms

    def undo(self) -> None:
        """Give norms the running statistics of before the step in which another process was lost; on a CPU."""
        for buffer, before in zip(self.model.buffers(), self._statistics, strict=False):
            buffer.copy_(before)

    def _total(self, parts: list[Batch], generator: torch.Generator) -> Total:
        """What gives the counts to divide by, from those of the first pass: those of all passes and processes."""
        if len(parts) == 1:
            return self.processes.total
        before = generator.get_state()
        image_seeds(len(parts[0].sizes), 2, generator)  # of the first pass, which counts its own
        with _keeping_statistics(self.model):
            later = [self._of(self.model.count_samples, part, generator) for part in parts[1:]]
        generator.set_state(before)
        whole: list[LossCounts] = []

        def total(own: LossCounts) -> LossCounts:
            if not whole:
                whole.append(self.processes.total(sum(later, start=own)))
            return whole[0]

        return total

    def _of(self, work, part: Batch, generator: torch.Generator, *more: object):  # type: ignore[no-untyped-def]
        device = next(self.model.parameters()).device
        images = part.inputs(self.model.recipe.input, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(self.model, device)):
            return work(images, part.input_sizes, part.targets, generator, *more)


def in_bfloat16(model: MaskRCNN, device: torch.device) -> bool:
    """Whether to compute in bfloat16: if the recipe says so, and not on a CPU that only emulates it."""
    return model.recipe.train.bf16 and usable_precision("bfloat16", device) == "bfloat16"


@contextmanager
def _keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Context manager within which batch norms do not update their running statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
