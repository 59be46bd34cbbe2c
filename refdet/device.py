"""Devices, their precision, and copies from the host."""

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
    """The device of a name such as "cpu" or "cuda:1"; a GPU if there is one for None and "auto".

    Raises:
        InputError: the device does not exist or cannot be used.
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
    """The device of a name and why it was chosen, for the first line of a run.

    "cpu (no GPU is visible)", "cuda:0 NVIDIA H100 (chosen by default)", "cpu (as requested)".

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    device, chosen = usable_device(name), name is None or name == "auto"
    if device.type != "cuda":
        return f"{device} ({'no GPU is visible' if chosen else 'as requested'})"
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} {torch.cuda.get_device_name(index)} ({'chosen by default' if chosen else 'as requested'})"


def usable_precision(precision: str, device: torch.device) -> str:
    """The precision to use: float32 instead of bfloat16 on CPUs that only emulate it, 10 to 40 times slower."""
    if precision != "bfloat16" or device.type != "cpu":
        return precision
    try:
        there = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        there = False
    return precision if there else "float32"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Context manager that disables TF32 and reduced-precision float32, then restores the settings.

    By default PyTorch rounds the inputs of convolutions on a GPU to TF32, with 10 bits of mantissa instead of 23, and
    optionally those of matrix products, on the CPU too. There are older and newer settings, which raise an error where
    they contradict each other, so both are set. They are per process, not per thread.
    """
    backends: Any = torch.backends
    newer = (
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
    )
    before = [setting.fp32_precision for setting in newer]
    convolutions = _older(lambda: backends.cudnn.allow_tf32, False)
    products = _older(torch.get_float32_matmul_precision, "highest")
    try:
        _set(False, "highest", newer, ["ieee"] * len(newer))
        yield
    finally:
        _set(convolutions, products, newer, before)


def _older(setting: Callable[[], _Value], strict: _Value) -> _Value:
    """An older setting, or the strict value if it contradicts the newer ones and cannot be read."""
    try:
        with _quiet():
            return setting()
    except RuntimeError:
        return strict


def _set(convolutions: bool, products: str, newer: Sequence[Any], values: Sequence[str]) -> None:
    with _quiet():
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
    for setting, value in zip(newer, values, strict=True):  # after the older ones, which change these
        setting.fp32_precision = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress PyTorch's warnings about the older settings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        yield


def pinned(values: np.ndarray) -> np.ndarray:
    """A copy in pinned memory; can be called from any thread."""
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().numpy()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without synchronizing with the GPU."""
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)


def start_fetching(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host; the function returned waits for the copy, and for nothing queued later."""
    fetched = values.detach().to("cpu", non_blocking=True)  # into pinned memory
    if values.device.type != "cuda":
        return lambda: fetched
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        copied.synchronize()
        return fetched

    return wait
