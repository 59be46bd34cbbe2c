"""Memory limits of a device: of a GPU by PyTorch's allocator, and of the CPU by counting its tensors.

PyTorch compares a GPU's limit with the memory that it has reserved, but frees cached blocks before it raises an error.
So a computation exceeds a limit below what it allocates for certain, but perhaps not one below what it reserves.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from devices import is_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refdet.device import resolve_device


class Memory(Protocol):
    """Memory of a device, which can be limited."""

    def allow(self, more: float | None) -> None:
        """Free unused memory, and raise `OutOfMemoryError` after so many further bytes; None for no limit."""

    def need(self, compute: Callable[[], object]) -> int:
        """Peak number of bytes that a computation allocates."""


@contextmanager
def memory_of(device: str) -> Iterator[Memory]:
    """The memory of a device; the limit is removed after the block."""
    memory = _GpuMemory(device) if is_gpu(device) else _CpuMemory()
    gc.collect()
    gc.freeze()  # for quick collections in the block
    try:
        if isinstance(memory, _CpuMemory):
            with memory:
                yield memory
        else:
            yield memory
    finally:
        gc.unfreeze()
        memory.allow(None)


@contextmanager
def too_little_memory(memory: Memory, fits: Callable[[], bool]) -> Iterator[None]:
    """Allow less memory in the block than `fits` needs to return True."""
    memory.allow(None)
    results: list[bool] = []
    need = memory.need(lambda: results.append(fits()))
    assert results == [True]
    # libraries use smaller workspaces if memory is short, so the limit has to be found by trying
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        memory.allow(share * need)
        if not fits():
            break
    else:
        raise AssertionError(f"a tenth of the {need} bytes that it allocates is enough")
    memory.allow((share - 0.05) * need)
    yield


class _GpuMemory:
    def __init__(self, device: str) -> None:
        self._device = resolve_device(device)
        self._total = torch.cuda.get_device_properties(self._device).total_memory

    def allow(self, more: float | None) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(self._device)  # of earlier tests
        fraction = 1.0 if more is None else min((reserved + more) / self._total, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)

    def need(self, compute: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        compute()
        return torch.cuda.max_memory_allocated(self._device) - before


class _CpuMemory(TorchDispatchMode):
    """Counts the tensors that operators return in the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        self._limit: float | None = None
        self._tensors: Counter[int] = Counter()  # of each storage
        self._allocated = self._peak = 0
        self._lock = threading.RLock()

    def allow(self, more: float | None) -> None:
        gc.collect()
        self._limit = None if more is None else self._allocated + more

    def need(self, compute: Callable[[], object]) -> int:
        before = self._peak = self._allocated
        compute()
        return self._peak - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(y):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._watch(tensor)
        if self._limit is not None and self._allocated > self._limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory, or so it is said of a CPU")
        return y

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()

        def count(change: int) -> None:
            with self._lock:
                before = self._tensors[key]
                self._tensors[key] += change
                self._allocated += size * ((self._tensors[key] > 0) - (before > 0))
                self._peak = max(self._peak, self._allocated)

        count(1)
        weakref.finalize(tensor, count, -1)
