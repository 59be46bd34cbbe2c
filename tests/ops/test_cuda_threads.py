"""The kernels for GPUs, run thread by thread on the CPU: their arithmetic, bounds and barriers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from nms_problems import Problem, problems, scene

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ORDERS = (0, 1, 7)  # ascending, descending, shuffled
GUARD = 64  # elements around an array that a kernel must leave alone


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("threads") / "threads.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off"]
    folders = [f"-I{HERE.parents[1] / 'csrc'}", f"-I{HERE}"]
    subprocess.run(["g++", *flags, *folders, HERE / "cuda_threads.cpp", "-o", library], check=True)
    found = ctypes.CDLL(str(library))
    for name in ("keys", "greedy", "group_greedy", "bias_relu"):
        getattr(found, name).restype = ctypes.c_bool
    return found


def at(values: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if values is None else values.ctypes.data)


def long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def guarded(count: int, fill: float, dtype: Any = np.int64) -> np.ndarray:
    """An array with guards around it, of which a kernel gets the middle."""
    return np.full(count + 2 * GUARD, fill, dtype)


def by_threads(kernels: Any, problem: Problem, order: int, padded: bool) -> list[list[int]]:
    """What the kernels keep of each image; the images of a problem must be 0..count - 1, others are left out."""
    boxes, scores = (np.ascontiguousarray(t.numpy()) for t in (problem.boxes, problem.scores))
    count, n = 4, len(boxes)
    images, groups = (None if ids is None else ids.numpy() for ids in (problem.images, problem.groups))
    limit = n if problem.max_keep < 0 else problem.max_keep
    if n == 0 or limit == 0:
        return [[] for _ in range(count)]
    keys = np.zeros(n, np.int64)
    assert kernels.keys(at(scores), at(images), long(n), long(count), order, at(keys))
    places = np.argsort(keys, kind="stable")
    ordered = keys[places]
    kept, counts = guarded(count * limit if padded else n, -7), guarded(count, -7)
    assert kernels.greedy(
        at(boxes), at(groups), at(ordered), at(places), long(n), ctypes.c_float(problem.threshold), long(limit),
        long(limit if padded else -1), long(count), order, at(kept[GUARD:]), at(counts[GUARD:]),
    )  # fmt: skip
    for values in (kept, counts):
        assert (values[:GUARD] == -7).all() and (values[-GUARD:] == -7).all()
    starts = [limit * i if padded else int(np.searchsorted(ordered, i << 32)) for i in range(count)]
    numbers = counts[GUARD:-GUARD].tolist()
    own = kept[GUARD:-GUARD]
    assert (own != -7).sum() == sum(numbers)
    return [own[first : first + number].tolist() for first, number in zip(starts, numbers, strict=True)]


def by_groups(kernels: Any, problem: Problem, order: int) -> list[int]:
    """What the kernels keep without a limit, a block for each group of each image; images as in `by_threads`."""
    boxes, scores = (np.ascontiguousarray(t.numpy()) for t in (problem.boxes, problem.scores))
    n = len(boxes)
    nothing = np.zeros(n, np.int64)
    images, groups = (nothing if ids is None else ids.numpy() for ids in (problem.images, problem.groups))
    if n == 0:
        return []
    keys = np.zeros(n, np.int64)
    assert kernels.keys(at(scores), at(images), long(n), long(4), order, at(keys))
    places = np.argsort(keys, kind="stable")
    by_group = np.argsort(groups[places], kind="stable")
    ordered, own_groups = keys[places], groups[places][by_group]
    kept, scratch = guarded(n, -7), guarded(n, -7)
    assert kernels.group_greedy(
        at(boxes), at(own_groups), at(ordered), at(places), at(by_group), long(n), ctypes.c_float(problem.threshold),
        order, at(scratch[GUARD:]), at(kept[GUARD:]),
    )  # fmt: skip
    for values in (kept, scratch):
        assert (values[:GUARD] == -7).all() and (values[-GUARD:] == -7).all()
    return [index for index in kept[GUARD:-GUARD].tolist() if index != -7]


def wanted(problem: Problem) -> list[list[int]]:
    images = torch.zeros(len(problem.boxes), dtype=torch.int64) if problem.images is None else problem.images
    found: list[list[int]] = [[] for _ in range(4)]
    for index in problem.brute_force():
        if 0 <= images[index] < 4:
            found[images[index]].append(index)
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_nms_is_the_brute_force_in_any_order_of_threads(kernels: Any, problem: Problem) -> None:
    answer = wanted(problem)
    for order in ORDERS:
        assert by_threads(kernels, problem, order, padded=order != 1) == answer


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems())
def test_nms_of_each_group_by_a_block_is_the_brute_force(kernels: Any, problem: Problem) -> None:
    inside = None if problem.images is None else problem.images.clamp(0, 3)
    problem = replace(problem, max_keep=-1, images=inside)
    answer = problem.brute_force()
    for order in ORDERS:
        assert by_groups(kernels, problem, order) == answer


@pytest.mark.parametrize("groups", [1, 30])
def test_nms_of_each_group_of_many_boxes(kernels: Any, groups: int) -> None:
    """Of groups with more boxes than fit into shared memory, and of groups of a chunk."""
    problem = scene(1300, groups, 2)
    assert by_groups(kernels, problem, ORDERS[2]) == problem.brute_force()


@pytest.mark.parametrize("max_keep", [-1, 1, 150])
def test_nms_of_more_boxes_than_fit_into_shared_memory(kernels: Any, max_keep: int) -> None:
    problem = scene(2500, 40, 2, max_keep=max_keep)
    answer = wanted(problem)
    assert max(map(len, answer)) > 1024 or max_keep > 0
    for order in ORDERS:
        assert by_threads(kernels, problem, order, padded=True) == answer


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("channels", "whole"), [(8, True), (64, True), (6, False), (300, False), (2048, True)])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_bias_relu_is_plain_pytorch(kernels: Any, rows: int, channels: int, whole: bool, order: int) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, channels + 8)).astype(np.float32)
    wide = random.normal(size=(rows, channels + 4)).astype(np.float32)  # the shortcut is a part of it
    x[0, 0], x[-1, channels - 1], wide[0, 1] = np.nan, np.inf, -np.inf
    bias = random.normal(size=channels).astype(np.float32)
    for shortcut in (None, wide):
        out = guarded(rows * channels, 5.5, np.float32)
        assert kernels.bias_relu(
            at(x), long(channels + 8), at(bias), at(shortcut), long(channels + 4), at(out[GUARD:]), long(channels),
            long(rows), long(channels), whole, order,
        )  # fmt: skip
        total = torch.from_numpy(x[:, :channels]) + torch.from_numpy(bias)
        if shortcut is not None:
            total = total + torch.from_numpy(shortcut[:, :channels])
        np.testing.assert_array_equal(out[GUARD:-GUARD].reshape(rows, channels), torch.relu(total).numpy())
        assert (out[:GUARD] == 5.5).all() and (out[-GUARD:] == 5.5).all()


def test_bias_relu_in_place(kernels: Any) -> None:
    """More rows than threads, so that threads loop."""
    random = np.random.default_rng(0)
    x = random.normal(size=(70000, 64)).astype(np.float32)
    bias, expected = np.ones(64, np.float32), np.maximum(x + 1, 0)
    assert kernels.bias_relu(
        at(x), long(64), at(bias), at(None), long(0), at(x), long(64), long(len(x)), long(64), True, 7
    )
    np.testing.assert_array_equal(x, expected)
