"""Devices: selection, arithmetic precision, copies to and from the host, and out-of-memory errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from refdet.errors import InputError

_Value = TypeVar("_Value")
_TF32_CAPABILITY = (8, 0)  # compute capability of Ampere, the first GPUs with TF32
# out-of-memory messages of the CUDA runtime, cuBLAS and cuDNN
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
# messages of libraries that failed to load a kernel or allocate a workspace, for want of memory or another reason
_MAYBE_OUT_OF_MEMORY = ("CUDNN_STATUS_INTERNAL_ERROR", "_STATUS_NOT_INITIALIZED", "unable to find an engine")
# loading a library's kernels and making its handle take less: with this much free, the failure has another cause
_ENOUGH_FREE_BYTES = 2**29


def resolve_device(name: str | None) -> torch.device:
    """The device with a name such as "cpu" or "cuda:1"; for None and "auto", a GPU if there is one.

    A GPU also becomes this thread's current device, on which PyTorch records events and creates streams.

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        value = torch.zeros(1, device=name)
        value.item()  # fails on the meta device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # the next sentence lists all of PyTorch's backends
        raise InputError(f"`device` {name}: cannot be used ({reason}); try `device='cpu'`") from error
    device = value.device  # with an index, even if a GPU was named without one
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe_device(name: str | None) -> str:
    """The device that `resolve_device` returns and why, for the first line of a run.

    For example "cpu (no GPU is visible)", "cuda:0 NVIDIA H100 (chosen by default)" or "cpu (as requested)".

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    device = resolve_device(name)
    is_default = name is None or name == "auto"
    if device.type != "cuda":
        return f"{device} ({'no GPU is visible' if is_default else 'as requested'})"
    return f"{device} {torch.cuda.get_device_name(device)} ({'chosen by default' if is_default else 'as requested'})"


def supported_precision(precision: str, device: torch.device) -> str:
    """The requested precision, or float32 if the device does not support it.

    Only GPUs from Ampere on have TF32. bfloat16 counts as unsupported on CPUs that emulate it, 10 to 40 times slower.
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
    """Context manager that sets how float32 tensors are multiplied, then restores the settings.

    By default PyTorch rounds the inputs of convolutions on a GPU to TF32, with 10 bits of mantissa instead of 23; it
    can also be set to round those of matrix products, on the CPU too. PyTorch has legacy and newer settings, and raises
    an error where they contradict each other, so both are set. They apply to the whole process, not to a thread.

    Args:
        precision: "tf32" for TF32 in convolutions and matrix products on a GPU; "float32" or "bfloat16" for IEEE
            float32. (With "bfloat16" the layers have bfloat16 weights, which this setting does not affect.)
    """
    backends: Any = torch.backends
    on_gpu = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    settings = (*on_gpu, backends.mkldnn.conv, backends.mkldnn.matmul)
    previous = [setting.fp32_precision for setting in settings]
    previous_allow_tf32 = _read_legacy(lambda: backends.cudnn.allow_tf32, strictest=False)
    previous_matmul = _read_legacy(torch.get_float32_matmul_precision, strictest="highest")
    tf32 = precision == "tf32"
    values = ["tf32" if tf32 and setting in on_gpu else "ieee" for setting in settings]
    try:
        _set_float32_arithmetic(tf32, "high" if tf32 else "highest", settings, values)
        yield
    finally:
        _set_float32_arithmetic(previous_allow_tf32, previous_matmul, settings, previous)


def _read_legacy(read: Callable[[], _Value], strictest: _Value) -> _Value:
    """A legacy setting, or the strictest value if it contradicts the newer settings and so cannot be read."""
    try:
        with _suppress_legacy_warnings():
            return read()
    except RuntimeError:
        return strictest


def _set_float32_arithmetic(
    cudnn_allow_tf32: bool, matmul_precision: str, settings: Sequence[Any], values: Sequence[str]
) -> None:
    """Set the two legacy settings, and after them the newer `settings` to `values`, as the legacy ones change these."""
    with _suppress_legacy_warnings():
        torch.backends.cudnn.allow_tf32 = cudnn_allow_tf32
        torch.set_float32_matmul_precision(matmul_precision)
    for setting, value in zip(settings, values, strict=True):
        setting.fp32_precision = value


@contextmanager
def _suppress_legacy_warnings() -> Iterator[None]:
    """Suppress PyTorch's warnings about the legacy settings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        yield


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without synchronizing with a GPU; returns a tensor that is there already."""
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)


@contextmanager
def as_out_of_memory_error() -> Iterator[None]:
    """Context manager that turns out-of-memory errors of CUDA libraries into `OutOfMemoryError`.

    PyTorch raises `OutOfMemoryError` for its own allocations only. Allocations by cuBLAS, cuDNN and the CUDA runtime,
    such as handles, kernels and workspaces, fail with a RuntimeError whose message has the library's status.

    Raises:
        torch.cuda.OutOfMemoryError: the GPU has too little memory.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # itself a RuntimeError
        raise
    except RuntimeError as error:
        if not _is_out_of_memory(str(error)):
            raise
        raise torch.cuda.OutOfMemoryError(str(error)) from error


def _is_out_of_memory(text: str) -> bool:
    """Whether an error with this message is caused by too little GPU memory."""
    if any(part in text for part in _OUT_OF_MEMORY):
        return True
    if not any(part in text for part in _MAYBE_OUT_OF_MEMORY):
        return False
    try:
        free_bytes, _ = torch.cuda.mem_get_info()
        return free_bytes < _ENOUGH_FREE_BYTES
    except RuntimeError:  # the GPU is no longer usable
        return False


def to_cpu_async(values: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host; the returned function waits for this copy only, and returns it.

    A tensor that is on the CPU is returned as it is, not copied.
    """
    on_host = values.detach().to("cpu", non_blocking=True)  # into pinned memory
    if values.device.type != "cuda":
        return lambda: on_host
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        copied.synchronize()
        return on_host

    return wait
