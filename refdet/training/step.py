"""A step of training that does not wait for the GPU: its losses are copied to the host meanwhile and read later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refdet.data.training_batches import Batch
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import start_fetching, usable_precision
from refdet.errors import RuntimeFailure
from refdet.training.optim import GuardedSGD, set_rate


@dataclass(frozen=True)
class StartedStep:
    """A step that a GPU may still be computing.

    Attributes:
        names: names of the loss terms.
        fetched: waits for the terms and the norm of the gradient, (terms + 1,) float32.
        image_ids: COCO ids of its images.
    """

    names: Sequence[str]
    fetched: Callable[[], Tensor]
    image_ids: Sequence[int]

    def losses(self) -> dict[str, float]:
        """The loss terms, once they are there.

        Raises:
            RuntimeFailure: a term or the gradient is not finite; neither this step nor a later one has changed the
                weights.
        """
        *values, norm = self.fetched().tolist()
        terms = dict(zip(self.names, values, strict=True))
        if not all(map(math.isfinite, values)):
            bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
            raise self._not_finite(f"loss is not finite ({bad})")
        if not math.isfinite(norm):
            raise self._not_finite("gradient is not finite")
        return terms

    def _not_finite(self, what: str) -> RuntimeFailure:
        return RuntimeFailure(
            f"the {what} on images {', '.join(map(str, self.image_ids))}; "
            "lower train.lr, or check these images; the last checkpoint is kept"
        )


def in_bfloat16(model: MaskRCNN, device: torch.device) -> bool:
    """Whether to compute in bfloat16: if the recipe says so, and not on a CPU that only emulates it."""
    return model.recipe.train.bf16 and usable_precision("bfloat16", device) == "bfloat16"


def start_step(
    model: MaskRCNN, sgd: GuardedSGD, batch: Batch, rate: float, max_grad_norm: float, generator: torch.Generator
) -> StartedStep:
    """Start a step of the optimiser.

    Args:
        model: the network, in training mode.
        sgd: its optimiser.
        batch: the images.
        rate: learning rate.
        max_grad_norm: largest L2 norm of all gradients together; 0 for no clipping.
        generator: on the CPU, seeded for this step.

    Returns:
        The step, whose losses can be read later.
    """
    device = next(model.parameters()).device
    images = batch.inputs(model.recipe.input, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(model, device)):
        losses = model.compute_losses(images, batch.input_sizes, batch.targets, generator)
    terms = torch.stack(list(losses.values()))
    set_rate(sgd, rate)
    sgd.zero_grad(set_to_none=True)
    terms.sum().backward()
    # with inf it only measures the norm, which the guard needs; one tensor of results is one copy to the host
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    results = torch.cat((terms.detach(), norm.detach().to(terms.dtype)[None]))
    sgd.guard(results)
    sgd.step()
    return StartedStep(list(losses), start_fetching(results), batch.image_ids)
