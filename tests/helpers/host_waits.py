"""Counts, on the CPU, the calls that would synchronize with a GPU: blocking copies, and reads of results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Functions that copy Python numbers into a tensor or back, and ATen operators that do so, also if called from C++.
PYTHON = {"tensor", "as_tensor", "new_tensor", "item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"}
ATEN = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "bincount", "lift_fresh", "nms"}
# Calls that copy numbers into a tensor: `to_device` does so through pinned memory, without waiting.
GIVEN = {"python tensor", "lift_fresh"}


class InPython(TorchFunctionMode):
    """Counts calls of functions by name, and asynchronous copies to the CPU in ``fetched``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.fetched = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.__name__] += 1
        self.fetched += func.__name__ == "to" and args[1:2] == ("cpu",) and (kwargs or {}).get("non_blocking", False)
        return func(*args, **(kwargs or {}))


class InAten(TorchDispatchMode):
    """Counts ATen operators by name, without their overload."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[tuple[InPython, InAten]]:
    """Count the calls within the block."""
    with InPython() as python, InAten() as aten:
        yield python, aten


def waits(python: InPython, aten: InAten) -> dict[str, int]:
    """The calls that would synchronize with a GPU, by name."""
    counts = {f"python {name}": python.calls[name] for name in PYTHON} | {name: aten.calls[name] for name in ATEN}
    return {name: count for name, count in counts.items() if count}


def answers(found: dict[str, int]) -> int:
    """How often the host waits for a result of the GPU."""
    return sum(count for name, count in found.items() if name not in GIVEN)
