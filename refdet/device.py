"""Devices, their precision, and copies from the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from refdet.errors import InputError

_Value = TypeVar("_Value")
_TF32_CAPABILITY = (8, 0)  # of Ampere, the first generation of GPUs with TF32
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")  # of the CUDA runtime, cuBLAS and cuDNN
# what the libraries report if they cannot load a kernel or allocate a workspace, but also for other reasons
_MAYBE_NO_MEMORY = ("CUDNN_STATUS_INTERNAL_ERROR", "_STATUS_NOT_INITIALIZED", "unable to find an engine")
_MIN_FREE_BYTES = 2**29  # a library and its handle take less


def resolve_device(name: str | None) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1"; a GPU if there is one for None and "auto".

    A GPU also becomes the current one of this thread, on which PyTorch records events and creates streams.

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device  # with an index, if a GPU was named without one
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"`device` {name}: cannot be used ({reason}); try `device='cpu'`") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe_device(name: str | None) -> str:
    """The device of a name and why it was chosen, for the first line of a run.

    "cpu (no GPU is visible)", "cuda:0 NVIDIA H100 (chosen by default)", "cpu (as requested)".

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    device, chosen = resolve_device(name), name is None or name == "auto"
    if device.type != "cuda":
        return f"{device} ({'no GPU is visible' if chosen else 'as requested'})"
    return f"{device} {torch.cuda.get_device_name(device)} ({'chosen by default' if chosen else 'as requested'})"


def supported_precision(precision: str, device: torch.device) -> str:
    """The precision to use: float32 if the device does not support the requested one.

    CPUs without bfloat16 arithmetic emulate it, 10 to 40 times slower. Only GPUs have TF32.
    """
    if precision == "tf32":
        return precision if _has_tf32(device) else "float32"
    if precision != "bfloat16" or device.type != "cpu":
        return precision
    try:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        supported = False
    return precision if supported else "float32"


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TF32_CAPABILITY


def exact_float32() -> AbstractContextManager[None]:
    """Context manager that disables TF32 and reduced-precision float32, then restores the settings."""
    return float32_arithmetic("float32")


@contextmanager
def float32_arithmetic(precision: str) -> Iterator[None]:
    """Context manager for how float32 tensors are multiplied, whatever was set before; restores the settings.

    By default PyTorch rounds the inputs of convolutions on a GPU to TF32, with 10 bits of mantissa instead of 23, and
    optionally those of matrix products, on the CPU too. There are older and newer settings, which raise an error where
    they contradict each other, so both are set. They are per process, not per thread.

    Args:
        precision: "tf32" for TF32 in convolutions and matrix products on a GPU. Otherwise IEEE float32; "bfloat16" is
            computed by layers of that dtype; operations in float32 remain exact.
    """
    backends: Any = torch.backends
    on_gpu = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    newer = (*on_gpu, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in newer]
    convolutions = _read_legacy(lambda: backends.cudnn.allow_tf32, False)
    products = _read_legacy(torch.get_float32_matmul_precision, "highest")
    tf32 = precision == "tf32"
    values = ["tf32" if tf32 and setting in on_gpu else "ieee" for setting in newer]
    try:
        _apply(tf32, "high" if tf32 else "highest", newer, values)
        yield
    finally:
        _apply(convolutions, products, newer, before)


def _read_legacy(setting: Callable[[], _Value], strict: _Value) -> _Value:
    """Read a legacy setting; the strict value if it contradicts the newer ones and cannot be read."""
    try:
        with _suppress_legacy_warnings():
            return setting()
    except RuntimeError:
        return strict


def _apply(convolutions: bool, products: str, newer: Sequence[Any], values: Sequence[str]) -> None:
    with _suppress_legacy_warnings():
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
    for setting, value in zip(newer, values, strict=True):  # after the legacy ones, which change these
        setting.fp32_precision = value


@contextmanager
def _suppress_legacy_warnings() -> Iterator[None]:
    """Suppress PyTorch's warnings about the older settings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        yield


def pin_array(values: np.ndarray) -> np.ndarray:
    """A copy in pinned memory; can be called from any thread."""
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().numpy()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without synchronizing with the GPU."""
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)


@contextmanager
def as_out_of_memory_error() -> Iterator[None]:
    """Context manager that turns the errors of libraries that ran out of GPU memory into `OutOfMemoryError`.

    PyTorch raises that for its own allocations only. cuBLAS and cuDNN allocate handles, kernels and workspaces, and the
    CUDA runtime other things, which fail as RuntimeError with the text of a status.

    Raises:
        torch.cuda.OutOfMemoryError: the GPU has too little memory.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not _is_out_of_memory(str(error)):
            raise
        raise torch.cuda.OutOfMemoryError(str(error)) from error


def _is_out_of_memory(text: str) -> bool:
    if any(part in text for part in _NO_MEMORY):
        return True
    if not any(part in text for part in _MAYBE_NO_MEMORY):
        return False
    try:
        return torch.cuda.mem_get_info()[0] < _MIN_FREE_BYTES
    except RuntimeError:  # the GPU is no longer usable
        return False


def to_cpu_async(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host; the returned function waits for the copy, but for nothing queued later."""
    fetched = values.detach().to("cpu", non_blocking=True)  # into pinned memory
    if values.device.type != "cuda":
        return lambda: fetched
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        copied.synchronize()
        return fetched

    return wait
