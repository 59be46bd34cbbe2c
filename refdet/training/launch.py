"""The environment variables that torchrun sets for the processes it starts. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refdet.errors import InputError

_REQUIRED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NO_ID = ("", "none")  # torchrun's run id if none is given


@dataclass(frozen=True)
class Launch:
    """This process among those that torchrun started.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        world_size: number of processes on all machines.
        local_rank: number of this process among those on its machine.
        local_world_size: number of processes on its machine.
        restarts: how often torchrun has restarted the processes; None if torchrun did not start them.
        run_id: ``--rdzv-id``, "" if it was not given.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int | None
    run_id: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """Read the variables; None outside torchrun.

        Raises:
            InputError: there are several processes, but variables they need to find each other are missing.
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
        if numbers[0] >= numbers[1]:
            raise InputError(f"RANK: is {numbers[0]} of {numbers[1]} processes (WORLD_SIZE); start with torchrun")
        restarts, run_id = environment.get("TORCHELASTIC_RESTART_COUNT", ""), environment.get("TORCHELASTIC_RUN_ID", "")
        rank, world_size, local_rank, local_world_size = numbers
        restart_count = int(restarts) if restarts.isdecimal() else None
        return cls(rank, world_size, local_rank, local_world_size, restart_count, "" if run_id in _NO_ID else run_id)

    def job(self) -> dict[str, str]:
        """Identify the torchrun job: its run id, torchrun's own process on this machine, and this process.

        torchrun's own process (the agent) stays the same when it restarts the others.
        """
        return {"run_id": self.run_id, "agent": _identity(os.getppid()), "process": _identity(os.getpid())}

    def takes_over(self, job: Mapping[str, object], restarts: int) -> bool:
        """Whether this process replaces the one that wrote a `job`, given the most restarts on any machine."""
        this = self.job()
        if self.restarts is None or job.get("process") == this["process"]:
            return False
        same_id = this["run_id"] != "" and job.get("run_id") == this["run_id"]
        return job.get("agent") == this["agent"] or (same_id and restarts > 0)  # a later job may have the same id


def _identity(pid: int) -> str:
    """An identifier of a process, unique across machines and over time: host name, process id and start time."""
    try:
        # field 22 of proc(5), in clock ticks since boot; fields are counted after the name, which may contain spaces
        started = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()}:{pid}:{started}"


def repeats_usage_errors(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another process on this machine has the same command line, and so reports the same usage errors."""
    return environment.get("LOCAL_RANK", "0") != "0" and "LOCAL_WORLD_SIZE" in environment
