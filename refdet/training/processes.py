"""`Processes`: interface to the processes that train together, implemented here for one. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from refdet.errors import RefdetError, RuntimeFailure

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from refdet.detector.loss_counts import LossCounts

T = TypeVar("T")


class ReportedElsewhere(RefdetError):
    """Raised in every process but the first if training ends with an error, which the first process reports.

    Attributes:
        exit_code: exit code of the first process.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class LostProcess(RuntimeFailure):
    """Another process of the training run ended without sharing an error, for example because it was killed."""


class Processes:
    """The single process of a training run; `refdet.training.distributed.ProcessGroup` is one of several.

    The images of a step are divided among the processes, and counts, losses and gradients are summed. All processes
    must call the methods in the same order.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_world_size: number of processes on this machine.
        lost: whether another process has ended without sharing an error.
    """

    rank, world_size, local_world_size, lost = 0, 1, 1, False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and reports to the user."""
        return self.rank == 0

    def share_error(self, error: Exception | None = None) -> None:
        """Raise an error that any of the processes has, in all of them."""
        if error is not None:
            raise error

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; an error in one of them is raised in all."""
        return work()

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process only; all processes return its result or raise its error."""
        return work()

    def gather(self, value: T) -> list[T]:
        """The values of all processes."""
        return [value]

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise InputError if a value differs between processes; the keys describe the values."""

    def restarted(self, out: Path) -> bool:
        """Whether torchrun restarted these processes in place of others that trained into `out`."""
        return False

    def device(self, name: str | None) -> str | None:
        """The name of this process's device, from the name given for all processes."""
        return name

    def prepare(self, device: torch.device, out: Path) -> None:
        """Prepare to compute, once the run directory exists and is locked."""

    def describe(self) -> str:
        """Human-readable description of the processes, machines, devices and backend; "" without torchrun."""
        return ""

    def wrap(self, network: nn.Module, momentum: list[Tensor]) -> nn.Module:
        """Wrap a network so that its weights, momentum and gradients are the same in all processes."""
        return network

    def convert_norms(self, model: nn.Module, device: torch.device) -> None:
        """Replace batch norms by norms over the images of all processes."""

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context manager for a pass whose gradients are accumulated, to be summed over processes in a later pass."""
        return nullcontext()

    def computing(self) -> AbstractContextManager[None]:
        """Context manager for a step; raises LostProcess if another process ends during it."""
        return nullcontext()

    def sum_counts(self, counts: LossCounts) -> LossCounts:
        """Sum counts over the processes."""
        return counts

    def sum_(self, values: Tensor) -> None:
        """Sum values over the processes, in place."""
