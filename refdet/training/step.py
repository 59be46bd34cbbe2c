"""A step of training that does not wait for the GPU: its losses are copied to the host meanwhile and read later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refdet.data.training_batches import Batch
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import start_fetching
from refdet.errors import RuntimeFailure
from refdet.training.optim import GuardedSGD, set_lr
from refdet.training.passes import Passes


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
            f"the {what} on images {', '.join(map(str, self.image_ids))}; "
            "lower train.lr, or check these images; the last checkpoint is kept"
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
    return PendingStep(names, start_fetching(results), batch.image_ids)
