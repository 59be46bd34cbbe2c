"""The device of each process that torchrun started: its own GPU, or the CPU."""

from __future__ import annotations

import socket

import torch

from refdet.errors import InputError
from refdet.files.short_text import format_count
from refdet.training.launch import Launch


def own_device(launch: Launch, name: str | None) -> str:
    """Name of the device of a process: its own GPU or the CPU.

    Args:
        launch: the process.
        name: device given for all processes: "cpu", "cuda", "auto", None for "auto", or for the only process of a
            machine a GPU such as "cuda:1".

    Raises:
        InputError: the name is that of a single GPU, but there are several processes on the machine; or the machine has
            fewer GPUs than processes.
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
