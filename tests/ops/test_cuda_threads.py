"""The CUDA kernels, run thread by thread on the CPU: their arithmetic, bounds and barriers."""

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
ORDERS = (0, 1, 7)  # of the threads between barriers: ascending, descending, shuffled (`run` in cuda_threads.h)
GUARD = 64  # elements before and after an output array that a kernel must not write
IMAGES = 4  # images of a problem; boxes of other images are ignored


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


def ptr(values: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if values is None else values.ctypes.data)


def int64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def guarded_array(count: int, fill: float, dtype: Any = np.int64) -> np.ndarray:
    """An array with `GUARD` elements on each side of the `count` elements that a kernel may write."""
    return np.full(count + 2 * GUARD, fill, dtype)


def run_greedy(kernels: Any, problem: Problem, order: int, padded: bool) -> list[list[int]]:
    """Boxes of each image that the kernel for whole images keeps, in the layout of `nms_padded` or of `nms`."""
    boxes, scores = (np.ascontiguousarray(t.numpy()) for t in (problem.boxes, problem.scores))
    n = len(boxes)
    images, groups = (None if ids is None else ids.numpy() for ids in (problem.images, problem.groups))
    limit = n if problem.max_keep < 0 else problem.max_keep
    if n == 0 or limit == 0:
        return [[] for _ in range(IMAGES)]
    keys = np.zeros(n, np.int64)
    assert kernels.keys(ptr(scores), ptr(images), int64(n), int64(IMAGES), order, ptr(keys))
    places = np.argsort(keys, kind="stable")
    ordered = keys[places]
    kept, counts = guarded_array(IMAGES * limit if padded else n, -7), guarded_array(IMAGES, -7)
    assert kernels.greedy(
        ptr(boxes), ptr(groups), ptr(ordered), ptr(places), int64(n), ctypes.c_float(problem.threshold), int64(limit),
        int64(limit if padded else -1), int64(IMAGES), order, ptr(kept[GUARD:]), ptr(counts[GUARD:]),
    )  # fmt: skip
    for values in (kept, counts):
        assert (values[:GUARD] == -7).all() and (values[-GUARD:] == -7).all()
    starts = [limit * i if padded else int(np.searchsorted(ordered, i << 32)) for i in range(IMAGES)]
    numbers = counts[GUARD:-GUARD].tolist()
    own = kept[GUARD:-GUARD]
    assert (own != -7).sum() == sum(numbers)
    return [own[first : first + number].tolist() for first, number in zip(starts, numbers, strict=True)]


def run_group_greedy(kernels: Any, problem: Problem, order: int) -> list[int]:
    """Boxes that the kernel with a block for each group of each image keeps; it has no limit."""
    boxes, scores = (np.ascontiguousarray(t.numpy()) for t in (problem.boxes, problem.scores))
    n = len(boxes)
    nothing = np.zeros(n, np.int64)
    images, groups = (nothing if ids is None else ids.numpy() for ids in (problem.images, problem.groups))
    if n == 0:
        return []
    keys = np.zeros(n, np.int64)
    assert kernels.keys(ptr(scores), ptr(images), int64(n), int64(IMAGES), order, ptr(keys))
    places = np.argsort(keys, kind="stable")
    by_group = np.argsort(groups[places], kind="stable")
    ordered, own_groups = keys[places], groups[places][by_group]
    kept, scratch = guarded_array(n, -7), guarded_array(n, -7)
    assert kernels.group_greedy(
        ptr(boxes), ptr(own_groups), ptr(ordered), ptr(places), ptr(by_group), int64(n),
        ctypes.c_float(problem.threshold), order, ptr(scratch[GUARD:]), ptr(kept[GUARD:]),
    )  # fmt: skip
    for values in (kept, scratch):
        assert (values[:GUARD] == -7).all() and (values[-GUARD:] == -7).all()
    return [index for index in kept[GUARD:-GUARD].tolist() if index != -7]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_greedy_kernel_equals_brute_force_in_any_order_of_threads(kernels: Any, problem: Problem) -> None:
    expected = problem.brute_force_by_image(IMAGES)
    for order in ORDERS:
        assert run_greedy(kernels, problem, order, padded=order != 1) == expected


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems())
def test_group_greedy_kernel_equals_brute_force_in_any_order_of_threads(kernels: Any, problem: Problem) -> None:
    inside = None if problem.images is None else problem.images.clamp(0, IMAGES - 1)
    problem = replace(problem, max_keep=-1, images=inside)
    expected = problem.brute_force()
    for order in ORDERS:
        assert run_group_greedy(kernels, problem, order) == expected


@pytest.mark.parametrize("groups", [1, 30])
def test_group_greedy_kernel_with_many_boxes(kernels: Any, groups: int) -> None:
    """About 650 boxes in a group of an image, which are several chunks of 64, or about 20, which are one."""
    problem = scene(1300, groups, 2)
    assert run_group_greedy(kernels, problem, ORDERS[2]) == problem.brute_force()


def test_group_greedy_kernel_suppresses_by_kept_boxes_beyond_shared_memory(kernels: Any) -> None:
    """Shared memory holds 1024 kept boxes: of 1100 disjoint boxes, the copies of the last 60 touch only later ones."""
    corner = torch.stack((torch.arange(1100) % 40, torch.arange(1100) // 40), dim=1) * 20.0
    disjoint = torch.cat((corner, corner + 10), dim=1)
    boxes = torch.cat((disjoint, disjoint[-60:]))
    problem = Problem(boxes, torch.linspace(1, 0, len(boxes)), 0.4, -1, torch.zeros(len(boxes)).long(), None)
    assert problem.brute_force() == list(range(1100))
    assert run_group_greedy(kernels, problem, ORDERS[2]) == list(range(1100))


@pytest.mark.parametrize("max_keep", [-1, 1, 150])
def test_greedy_kernel_with_more_boxes_than_fit_into_shared_memory(kernels: Any, max_keep: int) -> None:
    problem = scene(2500, 40, 2, max_keep=max_keep)
    expected = problem.brute_force_by_image(IMAGES)
    assert max(map(len, expected)) > 1024 or max_keep > 0
    for order in ORDERS:
        assert run_greedy(kernels, problem, order, padded=True) == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("channels", "whole"), [(8, True), (64, True), (6, False), (300, False), (2048, True)])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_bias_relu_equals_plain_pytorch(kernels: Any, rows: int, channels: int, whole: bool, order: int) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, channels + 8)).astype(np.float32)
    wide = random.normal(size=(rows, channels + 4)).astype(np.float32)  # the shortcut is its first channels
    x[0, 0], x[-1, channels - 1], wide[0, 1] = np.nan, np.inf, -np.inf
    bias = random.normal(size=channels).astype(np.float32)
    for shortcut in (None, wide):
        out = guarded_array(rows * channels, 5.5, np.float32)
        assert kernels.bias_relu(
            ptr(x), int64(channels + 8), ptr(bias), ptr(shortcut), int64(channels + 4), ptr(out[GUARD:]),
            int64(channels), int64(rows), int64(channels), whole, order,
        )  # fmt: skip
        total = torch.from_numpy(x[:, :channels]) + torch.from_numpy(bias)
        if shortcut is not None:
            total = total + torch.from_numpy(shortcut[:, :channels])
        np.testing.assert_array_equal(out[GUARD:-GUARD].reshape(rows, channels), torch.relu(total).numpy())
        assert (out[:GUARD] == 5.5).all() and (out[-GUARD:] == 5.5).all()


def test_bias_relu_in_place_with_more_rows_than_threads(kernels: Any) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(70000, 64)).astype(np.float32)
    bias, expected = np.ones(64, np.float32), np.maximum(x + 1, 0)
    assert kernels.bias_relu(
        ptr(x), int64(64), ptr(bias), ptr(None), int64(0), ptr(x), int64(64), int64(len(x)), int64(64), True, 7
    )
    np.testing.assert_array_equal(x, expected)
