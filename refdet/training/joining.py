"""Join the processes that train together, if torchrun started this one; otherwise does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from refdet.training.launch import Launch
from refdet.training.processes import TrainingProcess

_CURRENT: ContextVar[TrainingProcess | None] = ContextVar("training process", default=None)


@contextmanager
def join_processes() -> Iterator[TrainingProcess]:
    """Context manager that joins this process to the others that train with it, and yields it.

    Under torchrun, nested calls yield the same object; otherwise the process is the only one.

    Raises:
        InputError: the environment variables of torchrun are incomplete.
        ReportedElsewhere: in all processes but the first, if the block ends with an error in any process.
    """
    current, launch = _CURRENT.get(), None
    if current is None:
        launch = Launch.from_environment()
    if launch is None:
        yield current or TrainingProcess()
        return
    from refdet.training.distributed import join_torchrun  # imports torch, which takes seconds

    with join_torchrun(launch) as process:
        token = _CURRENT.set(process)
        try:
            yield process
        finally:
            _CURRENT.reset(token)


def in_all_processes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that runs a function within `join_processes`, so that an error in one process is raised in all."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with join_processes():
            return function(*args, **kwargs)

    return wrapper
