"""The environment variables that torchrun sets for the processes it starts. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refdet.errors import InputError

_REQUIRED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NO_RUN_ID = ("", "none")  # values of TORCHELASTIC_RUN_ID if the user gave no id


@dataclass(frozen=True)
class Launch:
    """This process among those that torchrun started.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        world_size: number of processes on all machines.
        local_rank: number of this process among those on its machine.
        local_world_size: number of processes on its machine.
        restarts: how often torchrun has restarted the processes; None if something else set the variables.
        run_id: torchrun's ``--rdzv-id``; "" if it was not given.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int | None
    run_id: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """Read the variables; None if they are incomplete and there is at most one process.

        Raises:
            InputError: there are several processes, but variables they need to find each other are missing; or a
                variable is not a valid number.
        """
        count = environment.get("WORLD_SIZE", "")
        missing = [name for name in _REQUIRED if not environment.get(name)]
        if not count.isdecimal() or missing:
            if count.isdecimal() and int(count) > 1:
                raise InputError(
                    f"WORLD_SIZE: is {count}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; "
                    "start with torchrun, which sets them all, or unset WORLD_SIZE to train in one process"
                )
            return None
        numbers = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if not environment[name].isdecimal():
                raise InputError(f"{name}: must be a number, not {environment[name]!r}; start with torchrun")
            numbers.append(int(environment[name]))
        rank, world_size, local_rank, local_world_size = numbers
        if rank >= world_size:
            raise InputError(f"RANK: is {rank} of {world_size} processes (WORLD_SIZE); start with torchrun")
        restarts, run_id = environment.get("TORCHELASTIC_RESTART_COUNT", ""), environment.get("TORCHELASTIC_RUN_ID", "")
        restart_count = int(restarts) if restarts.isdecimal() else None
        return cls(
            rank, world_size, local_rank, local_world_size, restart_count, "" if run_id in _NO_RUN_ID else run_id
        )

    def job(self) -> dict[str, str]:
        """Contents of the job file, by which a later process can tell whether torchrun started it to replace this one.

        The "agent" is torchrun's own process on this machine, which stays the same when it restarts the others.
        """
        return {"run_id": self.run_id, "agent": _identity(os.getppid()), "process": _identity(os.getpid())}

    def takes_over(self, job: Mapping[str, object], restarts: int) -> bool:
        """Whether torchrun started this process to replace the one that wrote a job file.

        Args:
            job: contents of the file.
            restarts: the largest `restarts` of all processes, as a machine that joined late has had fewer.
        """
        own = self.job()
        if self.restarts is None or job.get("process") == own["process"]:
            return False
        same_id = own["run_id"] != "" and job.get("run_id") == own["run_id"]
        # without a restart, the same id is that of a later job
        return job.get("agent") == own["agent"] or (same_id and restarts > 0)


def _identity(pid: int) -> str:
    """An identifier of a process, unique across machines and over time: host name, process id and start time."""
    try:
        # field 22 of proc(5), in clock ticks since boot: the 20th after field 2, the name in parentheses
        started = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()}:{pid}:{started}"


def repeats_usage_errors(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another process on this machine has the same command line and reports its usage errors.

    This is so in all processes of torchrun but the first of each machine.
    """
    return environment.get("LOCAL_RANK", "0") != "0" and "LOCAL_WORLD_SIZE" in environment
