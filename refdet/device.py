"""The device that the network runs on, how exactly it computes, and how it is given what the host has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from refdet.errors import InputError

_Value = TypeVar("_Value")


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


def described(name: str | None) -> str:
    """The device of a name, as in `usable_device`, and why it is that, for the first line of a run.

    "cpu (no GPU is visible)", "cuda:0 NVIDIA H100 (chosen by default)", "cpu (as requested)".

    Raises:
        InputError: there is no such device, or it cannot be used.
    """
    device, chosen = usable_device(name), name is None or name == "auto"
    if device.type != "cuda":
        return f"{device} ({'no GPU is visible' if chosen else 'as requested'})"
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} {torch.cuda.get_device_name(index)} ({'chosen by default' if chosen else 'as requested'})"


def usable_precision(precision: str, device: torch.device) -> str:
    """What to compute in where "float32" or "bfloat16" is asked for: float32 on a processor without bfloat16.

    There each of its numbers is taken apart and put together again, which takes 10 to 40 times as long.
    """
    if precision != "bfloat16" or device.type != "cpu":
        return precision
    try:
        there = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        there = False
    return precision if there else "float32"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it float32 is computed in float32; afterwards the settings are what they were.

    PyTorch lets convolutions on a GPU round what they multiply to TF32, 10 bits after the point instead of 23, unless
    it is told otherwise, and products of matrices, also on the CPU, where it is told to. It knows of that in older
    settings and in newer ones and fails where they contradict each other, so both are set. They are of the whole
    process, not of a thread.
    """
    backends: Any = torch.backends
    newer = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.conv,
             backends.mkldnn.matmul)  # fmt: skip
    before = [setting.fp32_precision for setting in newer]
    convolutions = _older(lambda: backends.cudnn.allow_tf32, False)
    products = _older(torch.get_float32_matmul_precision, "highest")
    try:
        _set(False, "highest", newer, ["ieee"] * len(newer))
        yield
    finally:
        _set(convolutions, products, newer, before)


def _older(setting: Callable[[], _Value], strict: _Value) -> _Value:
    """A setting, or the strict one where it contradicts the newer ones already, so that it cannot be read."""
    try:
        with _quiet():
            return setting()
    except RuntimeError:
        return strict


def _set(convolutions: bool, products: str, newer: Sequence[Any], values: Sequence[str]) -> None:
    with _quiet():
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
    for setting, value in zip(newer, values, strict=True):  # after the older ones, which change them
        setting.fp32_precision = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Some versions of PyTorch warn of any use of the older settings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        yield


def pinned(values: np.ndarray) -> np.ndarray:
    """A copy in memory that a GPU can read while the host goes on; made in any thread."""
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().numpy()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; does not wait for what a GPU was given before."""
    if device.type != "cuda":
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)
