"""Training in several processes started by torchrun.

The processes form two groups. In the control group (gloo), they exchange errors, signals and other small objects
without waiting for a GPU. In the other (NCCL on GPUs), they sum counts, losses and gradients.

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
from refdet.training.processes import LostProcess, Processes, ReportedElsewhere
from refdet.training.rank_log import RankLog
from refdet.training.rendezvous import rendezvous_store
from refdet.training.sync_norm import convert_norms

T = TypeVar("T")

JOB = Path("state", "torchrun.json")  # in a run directory: identifies the torchrun job that trains into it
_JOIN_TIMEOUT, _EXCHANGE_TIMEOUT, _STEP_TIMEOUT = timedelta(minutes=10), timedelta(days=7), timedelta(minutes=30)
_FINAL_TIMEOUT = timedelta(seconds=10)  # for the first process to report an error
_LOST_MESSAGE = "another process of this training ended without an error message (killed, or out of memory?)"
_ERRORS: dict[str, type[RefdetError]] = {kind.__name__: kind for kind in (InputError, RuntimeFailure, Interrupted)}


class ProcessGroup(Processes):
    """This process among those that torchrun started.

    Args:
        launch: the environment variables of torchrun.
        rank_log: log of this process's output; None in the first process.
    """

    def __init__(self, launch: Launch, rank_log: RankLog | None) -> None:
        self.rank, self.world_size, self.local_world_size = launch.rank, launch.world_size, launch.local_world_size
        self._launch, self._log = launch, rank_log
        self.ended = False  # whether all processes know the error that ends the training
        self._computing = False  # whether a step is in progress
        self._device = torch.device("cpu")
        self._devices: list[str] = []
        self._hosts: list[str] = []
        self._group: Any = None  # for tensors on the device
        try:
            store = rendezvous_store(launch, _JOIN_TIMEOUT)
            dist.init_process_group(
                "gloo", store=store, rank=launch.rank, world_size=launch.world_size, timeout=_JOIN_TIMEOUT
            )
            self._control: Any = dist.new_group(backend="gloo", timeout=_EXCHANGE_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).splitlines()[0]
            raise RuntimeFailure(
                f"torchrun: process {self.rank} of {self.world_size} cannot reach the others at {where} ({reason}); "
                "check the address and port, and firewalls between the machines"
            ) from error

    def check_peers(self) -> None:
        """Exchange host names; raise InputError if the processes have different versions of refdet or PyTorch."""
        self._hosts = self.gather(socket.gethostname())
        self.check_same({"the version of refdet": __version__, "the version of PyTorch": torch.__version__})

    def share_error(self, error: Exception | None = None) -> None:
        """Raise an error that any of the processes has, in all of them."""
        self._exchange(None, error, gather=False)

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; an error in one of them is raised in all."""
        try:
            result = work()
        except Exception as error:
            self.share_error(error)
            raise
        self.share_error()
        return result

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process only; all processes return its result or raise its error."""
        result: Any = None
        if self.is_first:
            try:
                result = work()
            except Exception as error:
                self.share_error(error)
                raise
        return self._exchange(result)[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes."""
        return self._exchange(value)

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise InputError if a value differs between processes; the keys describe the values."""
        gathered = self.gather(dict(values))
        for name in values:
            for rank, other in enumerate(gathered):
                if other[name] != gathered[0][name]:
                    self.ended = True  # every process raises the same error
                    raise InputError(
                        f"torchrun: {name} is {short_repr(other[name])} in process {rank} on {self._hosts[rank]}, and "
                        f"{short_repr(gathered[0][name])} in process 0 on {self._hosts[0]}; all must have the same"
                    )

    def restarted(self, out: Path) -> bool:
        """Whether torchrun restarted these processes in place of others that trained into `out`."""
        restarts = max(self.gather(self._launch.restarts or 0))
        return self.on_first(lambda: self._takes_over(out / JOB, restarts))

    def _takes_over(self, path: Path, restarts: int) -> bool:
        job = read_small_json(path) if path.is_file() else None
        return isinstance(job, dict) and self._launch.takes_over(job, restarts)

    def device(self, name: str | None) -> str | None:
        """The name of this process's device: its own GPU, unless `name` is that of the CPU."""
        return own_device(self._launch, name)

    def prepare(self, device: torch.device, out: Path) -> None:
        """Prepare to compute, once the run directory exists and is locked."""
        self.check_same({"the kind of device": device.type})
        self._device = device
        self._devices = self.gather(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        self.on_first(lambda: write_json(out / JOB, self._launch.job()))
        if self._log is not None:
            self._log.open(out)
        self._group = dist.new_group(backend=self._backend, timeout=_STEP_TIMEOUT)

    @property
    def _backend(self) -> str:
        return "nccl" if self._device.type == "cuda" else "gloo"

    def describe(self) -> str:
        """Human-readable description of the processes, machines, devices and backend."""
        machines = Counter(self._hosts)
        on = format_count(len(machines), "machine")
        if len(machines) > 1:
            on += " (" + ", ".join(f"{host} {count}" for host, count in machines.items()) + ")"
        devices = ", ".join(f"{count} x {name}" for name, count in Counter(self._devices).items())
        return f"{format_count(self.world_size, 'process')} on {on}, {devices}, {self._backend}"

    def wrap(self, network: nn.Module, momentum: list[Tensor]) -> nn.Module:
        """Wrap a network so that its weights, momentum and gradients are the same in all processes.

        Gradients are summed, not averaged, as the losses are divided by the counts of all processes.
        """
        with self.computing():
            wrapped = DistributedDataParallel(network, process_group=self._group, gradient_as_bucket_view=True)
            # statistics of norms are equal already; set as an attribute, which PyTorch before 2.14 has too
            wrapped.broadcast_buffers = False
            wrapped.register_comm_hook(self._group, _allreduce_hook)
            for buffer in momentum:
                values = buffer.contiguous()
                dist.broadcast(values, 0, group=self._group)
                buffer.copy_(values)
        return wrapped

    def convert_norms(self, model: nn.Module, device: torch.device) -> None:
        """Replace batch norms by norms over the images of all processes."""
        convert_norms(model, device, self._group)

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context manager for a pass whose gradients are accumulated, to be summed over processes in a later pass."""
        return network.no_sync()  # type: ignore[operator]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context manager for a step; raises LostProcess if another process ends during it."""
        self._computing = True
        try:
            yield
        except RuntimeError as error:
            if not _is_connection_error(error):
                raise
            self.lost = True
            raise LostProcess(_LOST_MESSAGE) from error
        self._computing = False  # stays True after an error, which `end` must not try to share

    def sum_counts(self, counts: LossCounts) -> LossCounts:
        """Sum counts over the processes."""
        values = counts.to_tensor(self._device)
        dist.all_reduce(values, group=self._group)
        return LossCounts.from_tensor(values)

    def sum_(self, values: Tensor) -> None:
        """Sum values over the processes, in place."""
        dist.all_reduce(values, group=self._group)

    def end(self, error: Exception) -> Exception:
        """Share the error that ends this process; returns the error to raise here.

        An error within a step cannot be shared, as the others may wait for this process there; torchrun ends them.
        """
        if not (self.ended or self.lost or self._computing):
            try:
                self.share_error(error)
            except Exception as agreed:
                error = error if self.lost else agreed
        if self.is_first or not (self.ended or self.lost):
            return error
        code = error.exit_code if isinstance(error, RefdetError) else RuntimeFailure.exit_code
        if not self.lost:  # torchrun ends all others as soon as one has ended
            with suppress(RuntimeError):
                work = dist.irecv(torch.zeros(1), src=0, group=self._control)
                if work is not None:
                    work.wait(_FINAL_TIMEOUT)
        return ReportedElsewhere(str(error), code)

    def _exchange(self, value: Any, error: Exception | None = None, gather: bool = True) -> list[Any]:
        """The values of all processes, or [] without `gather`; an error in any of them is raised in all."""
        if self.lost:
            if error is not None:
                raise error
            return [value] * self.world_size
        try:
            failed = torch.tensor([error is not None], dtype=torch.int64)
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._control)
            if failed.item():
                errors = self._gather_objects(None if error is None else (_error_name(error), _error_text(error)))
            elif gather:
                return self._gather_objects(value)
            else:
                return []
        except RuntimeError as lost:
            self.lost = True
            raise LostProcess(_LOST_MESSAGE) from (error or lost)
        self.ended = True
        raise self._select_error(errors, error)

    def _gather_objects(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._control)
        return gathered

    def _select_error(self, errors: list[tuple[str, str] | None], error: Exception | None) -> Exception:
        """The error to report if there are several: one by a signal only if there is no other."""
        ranks = [rank for rank, entry in enumerate(errors) if entry is not None]
        rank = min(ranks, key=lambda rank: (errors[rank][0] == Interrupted.__name__, rank))  # type: ignore[index]
        if rank == self.rank and error is not None:
            return error
        kind, text = errors[rank]  # type: ignore[misc]
        if self._hosts[rank] != self._hosts[0]:
            text += f" (on {self._hosts[rank]})"
        return _ERRORS[kind](text)


def own_device(launch: Launch, name: str | None) -> str:
    """The device of a process, its own GPU or the CPU, from the name given for all processes.

    Raises:
        InputError: the name is that of a single GPU, or a machine has fewer GPUs than processes.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda") or (":" in name and launch.local_world_size == 1):
        return name
    if ":" in name:
        raise InputError(
            f"`device` {name}: one GPU for the {launch.local_world_size} processes of a machine; leave it out, and "
            "each has its own"
        )
    gpus = torch.cuda.device_count()
    if 0 < gpus < launch.local_world_size:
        raise InputError(
            f"torchrun: {launch.local_world_size} processes on {socket.gethostname()}, which has "
            f"{format_count(gpus, 'GPU')}; start at most {gpus} there"
        )
    return f"cuda:{launch.local_rank}"


@contextmanager
def join_group(launch: Launch) -> Iterator[ProcessGroup]:
    """Context manager that joins the processes of torchrun.

    Raises:
        RuntimeFailure: they cannot reach each other.
        ReportedElsewhere: in all processes but the first, if the block ends with an error in any process.
    """
    rank_log = RankLog(launch.rank) if launch.rank else None
    try:
        group = ProcessGroup(launch, rank_log)
        try:
            group.check_peers()
            with warnings.catch_warnings():
                # harmless, for 1x1 convolutions, whose strides are ambiguous
                warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
                yield group
            group.share_error()
        except Exception as error:
            ended = group.end(error)
            if rank_log is not None:
                print(f"error: {ended}", flush=True)  # into its log
            if ended is error:
                raise
            raise ended from error
        except KeyboardInterrupt:  # before training starts; then it is handled there
            if rank_log is None:
                raise
            raise ReportedElsewhere("interrupted", Interrupted.exit_code) from None
        dist.destroy_process_group()  # not after an error: the others wait for this process to end
    finally:
        if rank_log is not None:
            rank_log.close()


def _allreduce_hook(group, bucket):  # type: ignore[no-untyped-def]  # PyTorch refuses annotations in quotes
    """Sum a bucket of gradients over the processes."""
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
