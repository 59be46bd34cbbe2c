"""Parametrization of tests that run on a GPU, and on the CPU to check the test code itself.

A test with a parameter ``device``, from `on_devices` or `on_every_gpu`, compares that device with the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from torch import Tensor

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SECOND = pytest.param("cuda:1", marks=pytest.mark.gpu(count=2))
on_devices = pytest.mark.parametrize("device", ["cpu", GPU])
on_every_gpu = pytest.mark.parametrize("device", ["cpu", GPU, SECOND])

_T = TypeVar("_T")


def variants_on_devices(variants: Collection[str], rehearsed: Collection[str]) -> pytest.MarkDecorator:
    """Parameters ``device`` and ``variant``: every variant on a GPU, and those in ``rehearsed`` elsewhere too."""
    return pytest.mark.parametrize(
        ("device", "variant"),
        [pytest.param(device, variant, marks=marks)
         for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu), ("cuda:1", pytest.mark.gpu(count=2)))
         for variant in variants if device == "cuda" or variant in rehearsed],
    )  # fmt: skip


def is_gpu(device: str) -> bool:
    return device != "cpu"


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Run the block on a stream other than the default one, and wait for it at the end."""
    if not is_gpu(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def runs(compute: Callable[[], _T], device: str) -> tuple[_T, _T, _T]:
    """Results of a computation done twice, and once on a side stream while the default stream is busy."""
    first, second = compute(), compute()
    if is_gpu(device):
        busy = torch.ones(2048, 2048, device=device)
        for _ in range(8):
            busy = busy @ busy
    with side_stream(device):
        third = compute()
    return first, second, third


def to(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]
