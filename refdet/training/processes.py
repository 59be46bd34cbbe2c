"""`TrainingProcess`: what a process needs to train together with others. No torch."""

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
    """Raised in every process but the first if training ends with an error: the first process reports it to the user.

    Attributes:
        exit_code: exit code of the first process.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class LostProcess(RuntimeFailure):
    """Another process of the training run ended without sharing an error, for example because it was killed."""


class TrainingProcess:
    """This process of a training run, if it is the only one.

    The subclass `refdet.training.distributed.TorchrunProcess` is one of the processes that torchrun started. They
    divide the images of each step among them, and sum their counts, losses and gradients. All processes must call the
    methods in the same order.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_world_size: number of processes on this machine.
        peer_lost: whether another process has ended without sharing an error.
    """

    rank, world_size, local_world_size, peer_lost = 0, 1, 1, False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and reports to the user."""
        return self.rank == 0

    def share_error(self, error: Exception | None = None) -> None:
        """Raise an error in all processes if `error` is given in any of them."""
        if error is not None:
            raise error

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; an error in one of them is raised in all."""
        return work()

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process only; all processes return its result or raise its error.

        Raises:
            LostProcess: in the other processes, if one was lost, as the result cannot be known.
        """
        return work()

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return [value]

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise InputError if a value differs between processes; the keys name the values in the message."""

    def is_restart(self, out: Path) -> bool:
        """Whether torchrun restarted all processes after one of them had failed while training into `out`."""
        return False

    def select_device(self, name: str | None) -> str | None:
        """Return the name of this process's device, given that for all processes, such as "cuda"; None is automatic."""
        return name

    def set_up(self, device: torch.device, out: Path) -> None:
        """Set up what several processes need: communication between their devices, and their logs in `out`.

        Args:
            device: device of this process.
            out: the run directory, which exists and is locked by the first process.
        """

    def describe(self) -> str:
        """Describe the processes, machines, devices and backend for the user; "" without torchrun."""
        return ""

    def make_data_parallel(self, network: nn.Module, momentum: list[Tensor]) -> nn.Module:
        """Wrap a network in DistributedDataParallel if there are several processes.

        Args:
            network: the network; the weights of the first process are copied to all.
            momentum: momentum buffers of the optimizer, copied likewise, as only the first process has read the saved
                state of a resumed run.

        Returns:
            The module to call in the forward pass.
        """
        return network

    def convert_sync_batchnorm(self, model: nn.Module, device: torch.device) -> None:
        """Replace the batch norms of a model by SyncBatchNorm if there are several processes."""

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context manager for passes that only accumulate gradients; the first pass after them sums over processes."""
        return nullcontext()

    def computing(self) -> AbstractContextManager[None]:
        """Context manager for communication between devices, as in a step.

        Raises:
            LostProcess: another process ended meanwhile.
        """
        return nullcontext()

    def sum_counts(self, counts: LossCounts) -> LossCounts:
        """Sum counts over the processes."""
        return counts

    def all_reduce(self, values: Tensor) -> None:
        """Sum values over the processes, in place."""
