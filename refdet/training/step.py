"""A step of training: its forward and backward passes, and the update of the weights.

A step is computed in one pass or in several, each of a part of the images of this process. Its losses are divided by
counts of samples of all its images, so they must be known before the first gradient is computed. With several passes
all but the first are therefore started twice: once up to the samples, to count them, and once for the gradients.

Nothing waits for the GPU: the losses are copied to the host meanwhile and read later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refdet.data.training_batches import Batch
from refdet.detector.loss_counts import LossCounts, Total
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.sampling import image_seeds
from refdet.device import supported_precision, to_cpu_async
from refdet.errors import RuntimeFailure
from refdet.training.optim import GuardedSGD, set_lr
from refdet.training.processes import Processes


@dataclass(frozen=True)
class PendingStep:
    """A step that a GPU may still be computing.

    Attributes:
        names: names of the loss terms.
        wait: waits for the terms and the norm of the gradient, (terms + 1,) float32.
        image_ids: COCO ids of its images, of all processes.
    """

    names: Sequence[str]
    wait: Callable[[], Tensor]
    image_ids: Sequence[int]

    def losses(self) -> dict[str, float]:
        """The loss terms, once they are there.

        Raises:
            RuntimeFailure: a term or the gradient is not finite; neither this step nor a later one has changed the
                weights.
        """
        *values, norm = self.wait().tolist()
        terms = dict(zip(self.names, values, strict=True))
        if not all(map(math.isfinite, values)):
            bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
            raise self._not_finite(f"loss is not finite ({bad})")
        if not math.isfinite(norm):
            raise self._not_finite("gradient is not finite")
        return terms

    def _not_finite(self, what: str) -> RuntimeFailure:
        return RuntimeFailure(
            f"the {what} on {'image' if len(self.image_ids) == 1 else 'images'} {', '.join(map(str, self.image_ids))}; "
            "lower train.lr, or check what is on them; the last checkpoint is kept"
        )


def start_step(
    model: MaskRCNN,
    sgd: GuardedSGD,
    batch: Batch,
    rate: float,
    max_grad_norm: float,
    generator: torch.Generator,
    passes: Passes | None = None,
) -> PendingStep:
    """Start a step of the optimizer.

    Args:
        model: the network, in training mode.
        sgd: its optimizer.
        batch: the images.
        rate: learning rate.
        max_grad_norm: largest L2 norm of all gradients together; 0 for no clipping.
        generator: on the CPU, seeded for this step.
        passes: computes the gradients; by default in this process alone.

    Returns:
        The step, whose losses can be read later.
    """
    set_lr(sgd, rate)
    sgd.zero_grad(set_to_none=True)
    names, terms = (passes or Passes(model)).backward(batch, generator)
    # with inf it only measures the norm, which the guard needs; one tensor of results is one copy to the host
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    results = torch.cat((terms, norm.detach().to(terms.dtype)[None]))
    sgd.guard(results)
    sgd.step()
    return PendingStep(names, to_cpu_async(results), batch.image_ids)


class LossNetwork(nn.Module):
    """A network with `compute_losses` as its forward, which DistributedDataParallel needs."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: object) -> dict[str, Tensor]:
        """The loss terms; see `MaskRCNN.compute_losses`."""
        return self.model.compute_losses(*inputs)  # type: ignore[arg-type]


class Passes:
    """Forward and backward passes, which compute the gradients of steps.

    Args:
        model: the network, in training mode.
        processes: each has a share of the images of a step.
        momentum: buffers of the optimizer; all processes start with those of the first.
    """

    def __init__(
        self, model: MaskRCNN, processes: Processes | None = None, momentum: list[Tensor] | None = None
    ) -> None:
        options = model.recipe.train
        self.model, self.processes, self._passes = model, processes or Processes(), options.accumulate
        self._images_before = self.processes.rank * (options.batch_size // self.processes.world_size)
        # on a GPU a step cannot be abandoned
        on_cpu = not next(model.parameters()).is_cuda
        self._keeps_buffers = on_cpu and self.processes.world_size > 1 and model.recipe.model.norm == "batch"
        self._buffers: list[Tensor] = []
        self._network = self.processes.wrap(LossNetwork(model), momentum or [])

    def backward(self, batch: Batch, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Compute the gradients of a step.

        Args:
            batch: the images of this process.
            generator: on the CPU, seeded for this step.

        Returns:
            Names of the loss terms, and their values over all images of all processes.
        """
        if self._keeps_buffers:
            self._buffers = [buffer.clone() for buffer in self.model.buffers()]
        if self._images_before:
            image_seeds(self._images_before, 2, generator)  # of the processes before this one
        parts = batch.parts(self._passes)
        total = self._total(parts, generator)
        names: list[str] = []
        values: list[Tensor] = []
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.processes.no_sync(self._network):
                losses = self._apply(self._network, part, generator, total)
                stacked = torch.stack(list(losses.values()))
                stacked.sum().backward()
            names = list(losses)
            values.append(stacked.detach())
        terms = sum(values[1:], start=values[0])
        self.processes.sum_(terms)
        return names, terms

    def undo(self) -> None:
        """Restore the norms' running statistics of before the step in which another process was lost; on a CPU."""
        for buffer, saved in zip(self.model.buffers(), self._buffers, strict=False):
            buffer.copy_(saved)

    def _total(self, parts: list[Batch], generator: torch.Generator) -> Total:
        """What gives the counts to divide by, from those of the first pass: those of all passes and processes."""
        if len(parts) == 1:
            return self.processes.total
        state = generator.get_state()
        image_seeds(len(parts[0].sizes), 2, generator)  # of the first pass, which counts its own samples
        with _keeping_statistics(self.model):
            later = [self._apply(self.model.count_samples, part, generator) for part in parts[1:]]
        generator.set_state(state)
        summed: list[LossCounts] = []

        def total(counts: LossCounts) -> LossCounts:
            if not summed:
                summed.append(self.processes.total(sum(later, start=counts)))
            return summed[0]

        return total

    def _apply(self, work, part: Batch, generator: torch.Generator, *extra: object):  # type: ignore[no-untyped-def]
        device = next(self.model.parameters()).device
        images = part.inputs(self.model.recipe.input, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(self.model, device)):
            return work(images, part.input_sizes, part.targets, generator, *extra)


def in_bfloat16(model: MaskRCNN, device: torch.device) -> bool:
    """Whether to compute in bfloat16: if the recipe says so, and not on a CPU that only emulates it."""
    return model.recipe.train.bf16 and supported_precision("bfloat16", device) == "bfloat16"


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
