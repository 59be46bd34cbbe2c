"""How a process joins those that it trains together with, if torchrun started it. No torch unless it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from refdet.training.launch import Launch
from refdet.training.processes import Processes

_CURRENT: ContextVar[Processes | None] = ContextVar("processes", default=None)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Context manager for the processes that train together; within it, what other calls of it give too.

    Raises:
        InputError: the variables of torchrun are incomplete.
        EndedTogether: in all processes but the first, where the block ends with an error in any.
    """
    current, launch = _CURRENT.get(), None
    if current is None:
        launch = Launch.from_environment()
    if launch is None:
        yield current or Processes()
        return
    from refdet.training.distributed import join_group  # imports torch, which takes seconds

    with join_group(launch) as group:
        token = _CURRENT.set(group)
        try:
            yield group
        finally:
            _CURRENT.reset(token)


def in_all_processes(work: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that the processes of torchrun run together, from its first check on."""

    @wraps(work)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        with join_processes():
            return work(*arguments, **keywords)

    return wrapper
