"""Join the processes that train together, if torchrun started this one; otherwise does not import torch."""

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
    """Context manager that yields the processes that train together; nested calls yield the same object.

    Raises:
        InputError: the environment variables of torchrun are incomplete.
        ReportedElsewhere: in all processes but the first, if the block ends with an error in any process.
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
    """Decorator that runs a function within `join_processes`, so that an error in one process is raised in all."""

    @wraps(work)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        with join_processes():
            return work(*arguments, **keywords)

    return wrapper
