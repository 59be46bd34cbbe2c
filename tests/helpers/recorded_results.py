"""Record the results of a method while other code calls it, so that a test does not compute them twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def results_of(owner: object, name: str) -> Iterator[list[Any]]:
    """Record the results of all calls of the method `name` of an object within the block."""
    method, results = getattr(owner, name), []

    def recording(*given: Any, **more: Any) -> Any:
        results.append(method(*given, **more))
        return results[-1]

    with patch.object(owner, name, recording):
        yield results
