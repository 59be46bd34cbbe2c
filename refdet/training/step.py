"""A training step: its forward and backward passes, and the update of the weights.

A step has one or more passes (gradient accumulation), each over a part of this process's images. The losses are divided
by the numbers of samples in all images of the step, which must be known before the first gradient is computed. So with
several passes, all but the first run twice: once up to sampling, to count the samples, and once for the gradients.

Nothing waits for the GPU: the losses are copied to the host asynchronously and read later.
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
from refdet.detector.loss_counts import LossCounts, ReduceCounts
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.sampling import image_seeds
from refdet.device import supported_precision, to_cpu_async
from refdet.errors import RuntimeFailure
from refdet.training.optim import GuardedSGD, set_lr
from refdet.training.processes import TrainingProcess

_SEEDS_PER_IMAGE = 2  # that `MaskRCNN` draws: for sampling anchors and for sampling RoIs


@dataclass(frozen=True)
class PendingStep:
    """A step that a GPU may still be computing.

    Attributes:
        names: names of the loss terms.
        wait: waits for the device, and returns the loss terms and the gradient norm, (terms + 1,) float32.
        image_ids: COCO ids of the step's images, in all processes.
    """

    names: Sequence[str]
    wait: Callable[[], Tensor]
    image_ids: Sequence[int]

    def losses(self) -> dict[str, float]:
        """Wait for the loss terms, and return them by name.

        Raises:
            RuntimeFailure: a term or the gradient is not finite. Neither this step nor a later one has changed the
                weights (see `GuardedSGD`).
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
            f"the {what} on {_names(self.image_ids)}; lower train.lr, or check what is on them; the last checkpoint is "
            "kept"
        )


def start_step(
    model: MaskRCNN,
    sgd: GuardedSGD,
    batch: Batch,
    lr: float,
    max_grad_norm: float,
    generator: torch.Generator,
    passes: Passes | None = None,
) -> PendingStep:
    """Start a step of the optimizer.

    Args:
        model: the network, in training mode.
        sgd: its optimizer.
        batch: the images.
        lr: learning rate.
        max_grad_norm: maximum L2 norm of all gradients together; 0 for no clipping.
        generator: on the CPU, seeded for this step.
        passes: computes the gradients; by default in this process alone.

    Returns:
        The step, whose losses can be read later.
    """
    set_lr(sgd, lr)
    sgd.zero_grad(set_to_none=True)
    names, terms = (passes or Passes(model)).backward(batch, generator)
    # with a maximum of inf it only measures the norm, which `guard` needs
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    results = torch.cat((terms, norm.detach().to(terms.dtype)[None]))  # one tensor, for a single copy to the host
    sgd.guard(results)
    sgd.step()
    return PendingStep(names, to_cpu_async(results), batch.image_ids)


class LossNetwork(nn.Module):
    """A network whose forward is `MaskRCNN.compute_losses`, as DistributedDataParallel hooks only into `forward`."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: object) -> dict[str, Tensor]:
        """The loss terms; see `MaskRCNN.compute_losses`."""
        return self.model.compute_losses(*inputs)  # type: ignore[arg-type]


class Passes:
    """The forward and backward passes that compute the gradients of each step.

    Args:
        model: the network, in training mode.
        process: this process, among those that divide the images of a step; by default the only one.
        momentum: momentum buffers of the optimizer; all processes start with those of the first.
    """

    def __init__(
        self, model: MaskRCNN, process: TrainingProcess | None = None, momentum: list[Tensor] | None = None
    ) -> None:
        options = model.recipe.train
        self.model, self.process, self._passes = model, process or TrainingProcess(), options.accumulate
        self._images_before = self.process.rank * (options.batch_size // self.process.world_size)
        # for `restore_buffers`; on a GPU, an abandoned step cannot be undone
        on_cpu = not next(model.parameters()).is_cuda
        self._saves_buffers = on_cpu and self.process.world_size > 1 and model.recipe.model.norm == "batch"
        self._saved_buffers: list[Tensor] = []
        self._network = self.process.make_data_parallel(LossNetwork(model), momentum or [])

    def backward(self, batch: Batch, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Compute the gradients of a step.

        Args:
            batch: the images of this process.
            generator: on the CPU, seeded for this step.

        Returns:
            Names of the loss terms, and their values over all images of all processes.
        """
        if self._saves_buffers:
            self._saved_buffers = [buffer.clone() for buffer in self.model.buffers()]
        if self._images_before:
            image_seeds(self._images_before, _SEEDS_PER_IMAGE, generator)  # skip those of processes before this one
        parts = batch.chunk(self._passes)
        reduce_counts = self._reduce_counts(parts, generator)
        names: list[str] = []
        values: list[Tensor] = []
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.process.no_sync(self._network):
                losses = self._apply(self._network, part, generator, reduce_counts)
                stacked = torch.stack(list(losses.values()))
                stacked.sum().backward()
            names = list(losses)
            values.append(stacked.detach())
        terms = sum(values[1:], start=values[0])
        self.process.all_reduce(terms)
        return names, terms

    def restore_buffers(self) -> None:
        """Undo the last step's changes to the running statistics of norms, after another process was lost in the step.

        Does nothing on a GPU.
        """
        for buffer, saved in zip(self.model.buffers(), self._saved_buffers, strict=False):
            buffer.copy_(saved)

    def _reduce_counts(self, parts: list[Batch], generator: torch.Generator) -> ReduceCounts:
        """Make the function that `compute_losses` calls to sum the counts of samples over all passes and processes.

        In the first pass, it is called with the counts of that pass, to which it adds those of the later passes. In the
        later passes, it returns the same sum.
        """
        if len(parts) == 1:
            return self.process.sum_counts
        state = generator.get_state()
        # skip the seeds of the first pass, which counts its own samples
        image_seeds(len(parts[0].sizes), _SEEDS_PER_IMAGE, generator)
        with _frozen_running_stats(self.model):
            later = [self._apply(self.model.count_samples, part, generator) for part in parts[1:]]
        generator.set_state(state)
        summed: list[LossCounts] = []

        def reduce_counts(counts: LossCounts) -> LossCounts:
            if not summed:
                summed.append(self.process.sum_counts(sum(later, start=counts)))
            return summed[0]

        return reduce_counts

    def _apply(self, work, part: Batch, generator: torch.Generator, *extra: object):  # type: ignore[no-untyped-def]
        """Call `work`, which is `LossNetwork` or `MaskRCNN.count_samples`, with the images of a pass."""
        device = next(self.model.parameters()).device
        images = part.inputs(self.model.recipe.input, device)
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(self.model, device)),
            _single_value_errors(part.image_ids),
        ):
            return work(images, part.input_sizes, part.targets, generator, *extra)


@contextmanager
def _single_value_errors(image_ids: Sequence[int]) -> Iterator[None]:
    """Context manager that turns the error of a batch norm without a variance to compute into a RuntimeFailure."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RuntimeFailure(
            f"{_names(image_ids)}: too small for batch norm, whose input is a single pixel; lower train.accumulate, or "
            "start a new run with a larger train.batch_size or input.min_sizes and input.max_size, or with `weights` "
            "and `model.norm=frozen`"
        ) from None


def _names(image_ids: Sequence[int]) -> str:
    """Text such as "images 4, 9"."""
    return f"{'image' if len(image_ids) == 1 else 'images'} {', '.join(map(str, image_ids))}"


def step_seed(seed: int, step: int) -> int:
    """Random seed of a step, counted from 0, so that a resumed run samples like an uninterrupted one.

    The factor is larger than the number of steps of most runs, so that runs with different seeds share no step's seed.
    """
    return seed * 1_000_003 + step


def uses_bfloat16(model: MaskRCNN, device: torch.device) -> bool:
    """Whether training computes in bfloat16: if the recipe says so, except on CPUs that only emulate it."""
    return model.recipe.train.bf16 and supported_precision("bfloat16", device) == "bfloat16"


@contextmanager
def _frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Context manager within which batch norms do not update their running statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
