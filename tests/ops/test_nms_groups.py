"""`nms` with several images and groups in one call."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from hypothesis import given, settings
from nms_problems import Problem, problems, scene
from torch import Tensor

from refdet.ops._library import DEVICES
from refdet.ops.nms import BLOCK, nms, nms_plain

pytestmark = pytest.mark.slow

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
cuda = pytest.mark.gpu(kernels=True)
kernel_and_fallback = pytest.mark.parametrize("function", [nms, nms_plain])


@kernel_and_fallback
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_nms_equals_brute_force(function: Callable[..., Tensor], problem: Problem) -> None:
    assert problem.solve(function) == problem.brute_force()


@cuda
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_cuda_nms_equals_brute_force(problem: Problem) -> None:
    assert problem.solve(nms, "cuda") == problem.brute_force()


@kernel_and_fallback
def test_groups_equal_torchvisions_batched_nms(function: Callable[..., Tensor]) -> None:
    problem = scene(3 * BLOCK + 11, 7, 1)
    expected = torchvision.ops.batched_nms(problem.boxes, problem.scores, problem.groups, problem.threshold).tolist()
    assert problem.solve(function) == expected
    limited = scene(3 * BLOCK + 11, 7, 1, max_keep=len(expected) // 2)
    assert limited.solve(function) == expected[: len(expected) // 2]


@kernel_and_fallback
def test_an_image_keeps_the_same_boxes_alone_and_in_a_batch(function: Callable[..., Tensor]) -> None:
    batch = scene(1500, 3, 5, max_keep=60)
    assert batch.groups is not None and batch.images is not None
    expected = []
    for image in range(5):
        rows = (batch.images == image).nonzero()[:, 0]
        alone = Problem(batch.boxes[rows], batch.scores[rows], 0.4, 60, batch.groups[rows], None)
        expected += rows[alone.solve(function)].tolist()
    assert len(expected) == 5 * 60  # each image reaches max_keep
    assert batch.solve(function) == expected


@kernel_and_fallback
def test_results_are_ordered_by_image_number_then_index(function: Callable[..., Tensor]) -> None:
    boxes, scores = torch.tensor([[0.0, 0, 4, 4]]).repeat(6, 1), torch.zeros(6)
    images = torch.tensor([9, -9, 9, -9, 9, -9])
    groups = torch.tensor([1, 1, 2, 1, 1, 2])
    assert function(boxes, scores, 0.5, images=images, groups=groups).tolist() == [1, 5, 0, 2]
    assert function(boxes, scores, 0.5, 1, images=images, groups=groups).tolist() == [1, 0]
    assert function(boxes, scores, 0.5, groups=torch.arange(6)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restore_threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    problem = scene(4000, 5, 9, max_keep=100)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(problem.solve(nms))
    assert found[0] == found[1] == found[2] == problem.solve(nms_plain)


def test_strided_inputs_and_other_dtypes() -> None:
    problem = scene(300, 3, 2)
    boxes, scores, groups, images = problem.boxes, problem.scores, problem.groups, problem.images
    assert groups is not None and images is not None
    wide, pairs = torch.zeros(300, 8), torch.stack((groups, images), dim=1)
    wide[:, ::2] = boxes
    found = nms(wide[:, ::2], scores, 0.4, groups=pairs[:, 0], images=pairs[:, 1])
    assert found.tolist() == problem.solve(nms)
    for dtype in (torch.bfloat16, torch.float16):
        half_boxes, half_scores = boxes.to(dtype), scores.to(dtype)
        found = nms(half_boxes, half_scores, 0.4, groups=groups, images=images)
        assert found.equal(nms(half_boxes.float(), half_scores.float(), 0.4, groups=groups, images=images))


@pytest.mark.parametrize("name", ["groups", "images"])
@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (torch.zeros(3), TypeError, "int64, got torch.float32"),
        (torch.zeros(3, dtype=torch.int32), TypeError, "int64, got torch.int32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"\(3,\), one per box, got \(2,\)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"\(3,\), one per box"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "one device, got cpu and meta"),
    ],
)
def test_invalid_ids_are_refused(name: str, ids: Tensor, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        nms(torch.zeros(3, 4), torch.zeros(3), 0.5, **{name: ids})


@compiled
@pytest.mark.parametrize("ids", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
def test_the_operator_refuses_invalid_ids(ids: Tensor) -> None:
    for name in ("groups", "images"):
        with pytest.raises(RuntimeError, match=f"nms: {name} must be"):
            torch.ops.refdet.nms(torch.zeros(3, 4), torch.zeros(3), 0.5, -1, **{name: ids})


@compiled
def test_the_operator_passes_opcheck() -> None:
    problem = scene(90, 3, 2)
    options = {"groups": problem.groups, "images": problem.images}
    torch.library.opcheck(torch.ops.refdet.nms.default, (problem.boxes, problem.scores, 0.5, 10), options)


@compiled
def test_nms_compiles_into_one_graph() -> None:
    def double_kept_boxes(boxes: Tensor, scores: Tensor, groups: Tensor, images: Tensor) -> Tensor:
        return boxes[nms(boxes, scores, 0.5, 10, groups=groups, images=images)] * 2

    problem = scene(90, 3, 2)
    arguments = (problem.boxes, problem.scores, problem.groups, problem.images)
    traced = torch.compile(double_kept_boxes, backend="eager", fullgraph=True)
    assert traced(*arguments).equal(double_kept_boxes(*arguments))


@cuda
@pytest.mark.parametrize("max_keep", [-1, 1, 300])
def test_cuda_nms_of_many_boxes(max_keep: int) -> None:
    problem = scene(9001, 2, 3, max_keep=max_keep)
    assert problem.solve(nms, "cuda") == problem.solve(nms)
