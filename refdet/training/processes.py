"""`Processes`: what a training does the same in one process and in several. No torch."""

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


class EndedTogether(RefdetError):
    """In every process but the first: training ended with an error, which the first process says.

    Attributes:
        exit_code: the same as of the first.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class LostProcess(RuntimeFailure):
    """Another process of the training ended without a word, as one that is killed does."""


class Processes:
    """A training in one process. `refdet.training.distributed.ProcessGroup` is one in several.

    A step's images are divided among the processes, and the counts, losses and gradients are summed. What is to be done
    together is done at the same place of the program by all.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
        local_world_size: number of them on this machine.
        lost: whether another process has ended without a word.
    """

    rank, world_size, local_world_size, lost = 0, 1, 1, False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def share_error(self, error: Exception | None = None) -> None:
        """Raise an error that any of the processes has, in all of them."""
        if error is not None:
            raise error

    def on_all(self, work: Callable[[], T]) -> T:
        """Work of every process by itself; an error of one is raised in all."""
        return work()

    def on_first(self, work: Callable[[], T]) -> T:
        """Work of the first process only; all return its result or raise its error."""
        return work()

    def gather(self, value: T) -> list[T]:
        """The values of all processes."""
        return [value]

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise InputError if a value is another one in another process; the keys say what they are."""

    def restarted(self, out: Path) -> bool:
        """Whether these processes take the place of others of the same start of torchrun, which trained into `out`."""
        return False

    def device(self, name: str | None) -> str | None:
        """The name of this process's device, from the name that was given for all."""
        return name

    def prepare(self, device: torch.device, out: Path) -> None:
        """Get ready to compute; the run directory is there and locked."""

    def describe(self) -> str:
        """The processes, machines, devices and backend; "" for a process that torchrun did not start."""
        return ""

    def wrap(self, network: nn.Module, momentum: list[Tensor]) -> nn.Module:
        """The network with its weights, momentum and gradients the same in all processes."""
        return network

    def convert_norms(self, model: nn.Module, device: torch.device) -> None:
        """Replace batch norms by those of the images of all processes."""

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context manager for a pass whose gradients are only added up: a later one is to sum them."""
        return nullcontext()

    def computing(self) -> AbstractContextManager[None]:
        """Context manager for a step. LostProcess if another process ended meanwhile."""
        return nullcontext()

    def sum_counts(self, counts: LossCounts) -> LossCounts:
        """Sum counts over the processes."""
        return counts

    def sum_(self, values: Tensor) -> None:
        """Sum values over the processes, in place."""
