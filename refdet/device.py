"""The device that the network runs on."""

from __future__ import annotations

import torch

from refdet.errors import InputError


def usable_device(name: str | None) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1"; the best there is for None and "auto".

    Raises:
        InputError: there is no such device, or it cannot be used.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used ({reason}); try --device cpu") from error
    return torch.device(name)
