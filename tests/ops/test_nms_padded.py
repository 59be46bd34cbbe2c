"""`nms_padded`, whose result has a fixed size."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from nms_problems import Problem, problems, scene
from torch import Tensor

from refdet.ops._library import DEVICES
from refdet.ops.nms import nms_padded, nms_padded_plain, unpad

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
kernel_and_fallback = pytest.mark.parametrize("function", [nms_padded, nms_padded_plain])
IMAGES = 4  # boxes of images other than 0 to 3 are ignored


def solve(problem: Problem, function: Callable[..., tuple[Tensor, Tensor]], device: str = "cpu") -> list[list[int]]:
    """Kept rows of each image, after checks of the shapes, the padding and `unpad`."""
    images = torch.zeros(len(problem.boxes), dtype=torch.int64) if problem.images is None else problem.images
    groups = None if problem.groups is None else problem.groups.to(device)
    limit = len(problem.boxes) if problem.max_keep < 0 else problem.max_keep
    boxes, scores = problem.boxes.to(device), problem.scores.to(device)
    kept, counts = function(boxes, scores, problem.threshold, limit, images.to(device), IMAGES, groups=groups)
    assert kept.shape == (IMAGES, limit) and counts.shape == (IMAGES,) and kept.dtype == counts.dtype == torch.int64
    flat, numbers = unpad(kept, counts)
    rows = [row[:number].tolist() for row, number in zip(kept, counts.tolist(), strict=True)]
    assert flat.tolist() == sum(rows, []) and numbers == counts.tolist()
    assert all((row[number:] == -1).all() for row, number in zip(kept, numbers, strict=True))
    return rows


@kernel_and_fallback
@settings(max_examples=100, deadline=None, derandomize=True)
@given(problem=problems())
def test_nms_equals_brute_force(function: Callable[..., tuple[Tensor, Tensor]], problem: Problem) -> None:
    assert solve(problem, function) == problem.brute_force_by_image(IMAGES)


@pytest.mark.gpu(kernels=True)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_cuda_nms_equals_brute_force(problem: Problem) -> None:
    assert solve(problem, nms_padded, "cuda") == problem.brute_force_by_image(IMAGES)


@pytest.mark.gpu(kernels=True)
@pytest.mark.parametrize("max_keep", [1, 300, 2500])
def test_cuda_nms_of_many_boxes(max_keep: int) -> None:
    problem = scene(9001, 50, 3, max_keep=max_keep)
    assert solve(problem, nms_padded, "cuda") == solve(problem, nms_padded)


@pytest.mark.gpu(kernels=True)
def test_cuda_nms_does_not_synchronize() -> None:
    problem = scene(9001, 2, 3, max_keep=300)
    boxes, scores, images, groups = (
        given.cuda() for given in (problem.boxes, problem.scores, problem.images, problem.groups) if given is not None
    )
    nms_padded(boxes, scores, 0.4, 300, images, IMAGES, groups=groups)  # allocates and caches what later calls reuse
    torch.cuda.set_sync_debug_mode("error")
    try:
        nms_padded(boxes, scores, 0.4, 300, images, IMAGES, groups=groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@kernel_and_fallback
def test_no_boxes_and_no_images(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    none, scores, ids = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    kept, counts = function(none, scores, 0.5, 3, ids, 2)
    assert kept.tolist() == [[-1] * 3] * 2 and counts.tolist() == [0, 0]
    kept, counts = function(torch.zeros(2, 4), torch.zeros(2), 0.5, 3, torch.zeros(2, dtype=torch.int64), 0)
    assert kept.shape == (0, 3) and unpad(kept, counts)[1] == []


@pytest.mark.parametrize(("max_keep", "count"), [(-1, 2), (3, -1)])
def test_negative_numbers_are_refused(max_keep: int, count: int) -> None:
    with pytest.raises(ValueError, match="nonnegative numbers"):
        nms_padded(torch.zeros(3, 4), torch.zeros(3), 0.5, max_keep, torch.zeros(3, dtype=torch.int64), count)


@compiled
@pytest.mark.parametrize(("max_keep", "count"), [(-1, 2), (3, -1), (3, 2**40)])
def test_the_operator_refuses_invalid_numbers(max_keep: int, count: int) -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="nms: "):
        torch.ops.refdet.nms_padded(torch.zeros(3, 4), torch.zeros(3), 0.5, max_keep, ids, count)


@compiled
def test_the_operator_passes_opcheck() -> None:
    problem = scene(90, 3, 2)
    given = (problem.boxes, problem.scores, 0.5, 10, problem.images, 2, problem.groups)
    torch.library.opcheck(torch.ops.refdet.nms_padded.default, given)


@compiled
def test_nms_compiles_into_one_graph() -> None:
    def combine_outputs(boxes: Tensor, scores: Tensor, images: Tensor) -> Tensor:
        kept, counts = nms_padded(boxes, scores, 0.5, 10, images, 2)
        return kept * 2 + counts[:, None]

    problem = scene(90, 3, 2)
    given = (problem.boxes, problem.scores, problem.images)
    assert torch.compile(combine_outputs, backend="eager", fullgraph=True)(*given).equal(combine_outputs(*given))


def test_unpad_concatenates_the_rows_of_all_images() -> None:
    kept = torch.tensor([[5, 2, -1], [-1, -1, -1], [9, 8, 7]])
    flat, numbers = unpad(kept, torch.tensor([2, 0, 3]))
    np.testing.assert_array_equal(flat, [5, 2, 9, 8, 7])
    assert numbers == [2, 0, 3]
