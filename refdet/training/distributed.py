"""Training in several processes started by torchrun.

The processes communicate in two groups of torch.distributed. In the control group (gloo), they exchange errors, signals
and other small objects without waiting for a GPU. In the device group (NCCL on GPUs, gloo on CPUs), they sum counts,
losses and gradients.

Every process makes the same exchanges in the same order, and each exchange carries the error of any process that cannot
continue. So an error outside a step is known to all processes before the next step.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from refdet.detector.loss_counts import LossCounts
from refdet.errors import InputError, Interrupted, RefdetError, RuntimeFailure
from refdet.files.atomic import write_json
from refdet.files.json_files import read_small_json
from refdet.files.short_text import format_count, short_repr
from refdet.files.version import __version__
from refdet.training.launch import Launch
from refdet.training.own_device import own_device
from refdet.training.processes import LostProcess, ReportedElsewhere, TrainingProcess
from refdet.training.rank_log import RankLog
from refdet.training.rendezvous import open_rendezvous_store
from refdet.training.sync_norm import convert_sync_batchnorm

T = TypeVar("T")

JOB_FILE = Path("state", "torchrun.json")  # in a run directory: identifies the torchrun job that trains into it
_JOIN_TIMEOUT, _STEP_TIMEOUT = timedelta(minutes=10), timedelta(minutes=30)
_EXCHANGE_TIMEOUT = timedelta(days=7)  # long, as the other processes wait in an exchange while the first validates
_REPORT_TIMEOUT = timedelta(seconds=10)  # how long the others wait for the first process to report an error
_LOST_MESSAGE = "another process of this training ended without an error message (killed, or out of memory?)"
# the errors that are shared by name; any other becomes a RuntimeFailure
_ERRORS: dict[str, type[RefdetError]] = {kind.__name__: kind for kind in (InputError, RuntimeFailure, Interrupted)}


class TorchrunProcess(TrainingProcess):
    """This process among those that torchrun started; connects to the others when it is made.

    Args:
        launch: the environment variables of torchrun.
        rank_log: log of this process's output; None in the first process.

    Raises:
        RuntimeFailure: the processes cannot reach each other.
    """

    def __init__(self, launch: Launch, rank_log: RankLog | None) -> None:
        self.rank, self.world_size, self.local_world_size = launch.rank, launch.world_size, launch.local_world_size
        self._launch, self._rank_log = launch, rank_log
        self._error_shared = False  # whether all processes know the error that ends the run
        self._computing = False  # whether a block of `computing` is in progress or has failed
        self._device = torch.device("cpu")
        self._devices: list[str] = []
        self._hosts: list[str] = []
        self._device_group: Any = None
        try:
            store = open_rendezvous_store(launch, _JOIN_TIMEOUT)
            dist.init_process_group(
                "gloo", store=store, rank=launch.rank, world_size=launch.world_size, timeout=_JOIN_TIMEOUT
            )
            self._control_group: Any = dist.new_group(backend="gloo", timeout=_EXCHANGE_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).splitlines()[0]
            raise RuntimeFailure(
                f"torchrun: process {self.rank} of {self.world_size} cannot reach the others at {where} ({reason}); "
                "check the address and port, and firewalls between the machines"
            ) from error

    def check_peers(self) -> None:
        """Exchange host names; raise InputError if the processes have different versions of refdet or PyTorch."""
        self._hosts = self.all_gather(socket.gethostname())
        self.check_same({"the version of refdet": __version__, "the version of PyTorch": torch.__version__})

    def share_error(self, error: Exception | None = None) -> None:
        """Raise an error in all processes if `error` is given in any of them."""
        self._exchange(None, error, gather=False)

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; an error in one of them is raised in all."""
        try:
            result = work()
        except Exception as error:
            self.share_error(error)
            raise  # for type checkers: `share_error` always raises when given an error
        self.share_error()
        return result

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process only; all processes return its result or raise its error.

        Once a process was lost, the first process runs `work` alone, and the others raise LostProcess.
        """
        if self.peer_lost and self.is_first:
            return work()
        result: Any = None
        if self.is_first:
            try:
                result = work()
            except Exception as error:
                self.share_error(error)
                raise
        return self._exchange(result)[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return self._exchange(value)

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise InputError if a value differs between processes; the keys name the values in the message."""
        gathered = self.all_gather(dict(values))
        for name in values:
            for rank, other in enumerate(gathered):
                if other[name] != gathered[0][name]:
                    self._error_shared = True  # as every process raises this same error
                    raise InputError(
                        f"torchrun: {name} is {short_repr(other[name])} in process {rank} on {self._hosts[rank]}, and "
                        f"{short_repr(gathered[0][name])} in process 0 on {self._hosts[0]}; all must have the same"
                    )

    def is_restart(self, out: Path) -> bool:
        """Whether torchrun restarted all processes after one of them had failed while training into `out`."""
        restarts = max(self.all_gather(self._launch.restarts or 0))
        return self.run_on_first(lambda: self._takes_over(out / JOB_FILE, restarts))

    def _takes_over(self, path: Path, restarts: int) -> bool:
        """Whether this process replaces the one that wrote the job file at `path`; False if there is no such file."""
        job = read_small_json(path) if path.is_file() else None
        return isinstance(job, dict) and self._launch.takes_over(job, restarts)

    def select_device(self, name: str | None) -> str | None:
        """Return the name of this process's own GPU, unless `name` is "cpu" or there is no GPU."""
        return own_device(self._launch, name)

    def set_up(self, device: torch.device, out: Path) -> None:
        """Check the devices, write the job file and open the log in `out`, and create the device group."""
        self.check_same({"the kind of device": device.type})
        self._device = device
        self._devices = self.all_gather(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        self.run_on_first(lambda: write_json(out / JOB_FILE, self._launch.job()))
        if self._rank_log is not None:
            self._rank_log.open(out)
        self._device_group = dist.new_group(backend=self._backend, timeout=_STEP_TIMEOUT)

    @property
    def _backend(self) -> str:
        return "nccl" if self._device.type == "cuda" else "gloo"

    def describe(self) -> str:
        """Describe the processes, machines, devices and backend for the user."""
        machines = Counter(self._hosts)
        on = format_count(len(machines), "machine")
        if len(machines) > 1:
            on += " (" + ", ".join(f"{host} {count}" for host, count in machines.items()) + ")"
        devices = ", ".join(f"{count} x {name}" for name, count in Counter(self._devices).items())
        return f"{format_count(self.world_size, 'process')} on {on}, {devices}, {self._backend}"

    def make_data_parallel(self, network: nn.Module, momentum: list[Tensor]) -> nn.Module:
        """Wrap a network in DistributedDataParallel, and copy the momentum of the first process to all.

        Gradients are summed, not averaged, as the losses are divided by the counts of all processes.
        """
        with self.computing():
            wrapped = DistributedDataParallel(network, process_group=self._device_group, gradient_as_bucket_view=True)
            # The constructor copies the first process's buffers to all. From then on, the running statistics of norms
            # are the same in all processes before each step, without further copies. Set as an attribute, because the
            # argument would prevent the first copy too, and was renamed in PyTorch 2.14.
            wrapped.broadcast_buffers = False
            wrapped.register_comm_hook(self._device_group, _allreduce_hook)
            for buffer in momentum:
                values = buffer.contiguous()
                dist.broadcast(values, 0, group=self._device_group)
                buffer.copy_(values)
        return wrapped

    def convert_sync_batchnorm(self, model: nn.Module, device: torch.device) -> None:
        """Replace the batch norms of a model by SyncBatchNorm over all processes."""
        convert_sync_batchnorm(model, device, self._device_group)

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context manager for passes that only accumulate gradients; the first pass after them sums over processes."""
        return network.no_sync()  # type: ignore[operator]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context manager for communication in the device group; raises LostProcess if another process has ended."""
        self._computing = True
        try:
            yield
        except RuntimeError as error:
            if not _is_connection_error(error):
                raise
            self.peer_lost = True
            raise LostProcess(_LOST_MESSAGE) from error
        self._computing = False  # but it stays True after an error, so that `finish_with` does not try to share it

    def sum_counts(self, counts: LossCounts) -> LossCounts:
        """Sum counts over the processes."""
        values = counts.to_tensor(self._device)
        dist.all_reduce(values, group=self._device_group)
        return LossCounts.from_tensor(values)

    def all_reduce(self, values: Tensor) -> None:
        """Sum values over the processes, in place."""
        dist.all_reduce(values, group=self._device_group)

    def finish_with(self, error: Exception) -> Exception:
        """Share the error that ends this process, if the others do not know it; returns the error to raise here.

        An error within a step cannot be shared, as the others may be waiting in that step; torchrun ends them.
        """
        if not (self._error_shared or self.peer_lost or self._computing):
            try:
                self.share_error(error)
            except Exception as agreed:  # `share_error` always raises: the error that all processes agree on
                error = error if self.peer_lost else agreed
        if self.is_first or not (self._error_shared or self.peer_lost):
            return error
        code = error.exit_code if isinstance(error, RefdetError) else RuntimeFailure.exit_code
        if not self.peer_lost:
            # torchrun ends all other processes as soon as one has ended, so the first process, which reports the error,
            # must end before this one. It sends nothing: its end makes `wait` fail.
            with suppress(RuntimeError):
                work = dist.irecv(torch.zeros(1), src=0, group=self._control_group)
                if work is not None:
                    work.wait(_REPORT_TIMEOUT)
        return ReportedElsewhere(str(error), code)

    def _exchange(self, value: Any, error: Exception | None = None, gather: bool = True) -> list[Any]:
        """Return the values of all processes, or [] without `gather`; an error in any of them is raised in all.

        Once a process was lost, nothing is exchanged: with `gather`, LostProcess is raised.
        """
        if self.peer_lost:  # each process continues alone, to save what was done
            if error is not None:
                raise error
            if gather:
                raise LostProcess(_LOST_MESSAGE)
            return []
        try:
            failed = torch.tensor([error is not None], dtype=torch.int64)
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._control_group)
            if failed.item():
                errors = self._gather_objects(None if error is None else (_error_name(error), _error_text(error)))
            elif gather:
                return self._gather_objects(value)
            else:
                return []
        except RuntimeError as lost:
            self.peer_lost = True
            raise LostProcess(_LOST_MESSAGE) from (error or lost)
        self._error_shared = True
        raise self._select_error(errors, error)

    def _gather_objects(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._control_group)
        return gathered

    def _select_error(self, errors: list[tuple[str, str] | None], error: Exception | None) -> Exception:
        """The error to report: that of the lowest rank, but an `Interrupted` only if there is no other.

        Args:
            errors: for each rank, class name and message of its error, or None.
            error: the error of this process, or None.
        """
        ranks = [rank for rank, entry in enumerate(errors) if entry is not None]
        rank = min(ranks, key=lambda rank: (errors[rank][0] == Interrupted.__name__, rank))  # type: ignore[index]
        if rank == self.rank and error is not None:
            return error
        kind, text = errors[rank]  # type: ignore[misc]
        if self._hosts[rank] != self._hosts[0]:
            text += f" (on {self._hosts[rank]})"
        return _ERRORS[kind](text)


@contextmanager
def join_torchrun(launch: Launch) -> Iterator[TorchrunProcess]:
    """Context manager that connects this process to the others that torchrun started.

    Raises:
        RuntimeFailure: the processes cannot reach each other.
        ReportedElsewhere: in all processes but the first, if the block ends with an error in any process.
    """
    rank_log = RankLog(launch.rank) if launch.rank else None
    try:
        process = TorchrunProcess(launch, rank_log)
        try:
            process.check_peers()
            with warnings.catch_warnings():
                # harmless: several strides describe the same memory layout of the weights of a 1x1 convolution
                warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
                yield process
            process.share_error()
        except Exception as error:
            final_error = process.finish_with(error)
            if rank_log is not None:
                with suppress(OSError):  # a full disk must not hide the error
                    print(f"error: {final_error}", flush=True)  # into the log of this process
            if final_error is error:
                raise
            raise final_error from error
        except KeyboardInterrupt:  # before the first step; from then on, `Stop` handles Ctrl-C
            if rank_log is None:
                raise
            raise ReportedElsewhere("interrupted", Interrupted.exit_code) from None
        dist.destroy_process_group()  # not after an error: `finish_with` of the others waits for this process to end
    finally:
        if rank_log is not None:
            rank_log.close()


def _allreduce_hook(group, bucket):  # type: ignore[no-untyped-def]  # PyTorch refuses annotations that are strings, as here
    """Communication hook of DistributedDataParallel that sums a bucket of gradients, and does not divide it."""
    future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _error_name(error: Exception) -> str:
    """The key of `_ERRORS` for an error."""
    return next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), RuntimeFailure.__name__)


def _error_text(error: Exception) -> str:
    """The message of an error, for all processes."""
    return str(error) if isinstance(error, RefdetError) else f"unexpected {type(error).__name__}: {error}"


def _is_connection_error(error: RuntimeError) -> bool:
    """Whether an error of PyTorch means that another process can no longer be reached."""
    return isinstance(error, dist.DistError) or any(part in str(error) for part in ("gloo", "NCCL", "Connection"))
