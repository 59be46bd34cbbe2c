"""NMS of many images and groups in one call."""

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
both = pytest.mark.parametrize("function", [nms, nms_plain])


@both
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_is_the_brute_force(function: Callable[..., Tensor], problem: Problem) -> None:
    assert problem.solve(function) == problem.brute_force()


@cuda
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_cuda_is_the_brute_force(problem: Problem) -> None:
    assert problem.solve(nms, "cuda") == problem.brute_force()


@both
def test_many_boxes_in_classes(function: Callable[..., Tensor]) -> None:
    one = scene(3 * BLOCK + 11, 7, 1)
    wanted = torchvision.ops.batched_nms(one.boxes, one.scores, one.groups, one.threshold).tolist()
    assert one.solve(function) == wanted
    stopped = scene(3 * BLOCK + 11, 7, 1, max_keep=len(wanted) // 2)
    assert stopped.solve(function) == wanted[: len(wanted) // 2]


@both
def test_each_image_is_as_it_is_alone(function: Callable[..., Tensor]) -> None:
    batch = scene(1500, 3, 5, max_keep=60)
    assert batch.groups is not None and batch.images is not None
    wanted = []
    for image in range(5):
        rows = (batch.images == image).nonzero()[:, 0]
        alone = Problem(batch.boxes[rows], batch.scores[rows], 0.4, 60, batch.groups[rows], None)
        wanted += rows[alone.solve(function)].tolist()
    assert len(wanted) == 300
    assert batch.solve(function) == wanted


@both
def test_ties_go_by_index_and_images_by_number(function: Callable[..., Tensor]) -> None:
    boxes, scores = torch.tensor([[0.0, 0, 4, 4]]).repeat(6, 1), torch.zeros(6)
    images = torch.tensor([9, -9, 9, -9, 9, -9])
    groups = torch.tensor([1, 1, 2, 1, 1, 2])
    assert function(boxes, scores, 0.5, images=images, groups=groups).tolist() == [1, 5, 0, 2]
    assert function(boxes, scores, 0.5, 1, images=images, groups=groups).tolist() == [1, 0]
    assert function(boxes, scores, 0.5, groups=torch.arange(6)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing() -> None:
    problem = scene(4000, 5, 9, max_keep=100)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(problem.solve(nms))
    assert found[0] == found[1] == found[2] == problem.solve(nms_plain)


def test_strided_and_other_types() -> None:
    problem = scene(300, 3, 2)
    boxes, scores, groups, images = problem.boxes, problem.scores, problem.groups, problem.images
    assert groups is not None and images is not None
    wide, pairs = torch.zeros(300, 8), torch.stack((groups, images), dim=1)
    wide[:, ::2] = boxes
    found = nms(wide[:, ::2], scores, 0.4, groups=pairs[:, 0], images=pairs[:, 1])
    assert found.tolist() == problem.solve(nms)
    for kind in (torch.bfloat16, torch.float16):
        few, rough = boxes.to(kind), scores.to(kind)
        found = nms(few, rough, 0.4, groups=groups, images=images)
        assert found.equal(nms(few.float(), rough.float(), 0.4, groups=groups, images=images))


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
def test_bad_ids(name: str, ids: Tensor, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        nms(torch.zeros(3, 4), torch.zeros(3), 0.5, **{name: ids})


@compiled
@pytest.mark.parametrize("ids", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
def test_the_kernel_checks_ids_for_itself(ids: Tensor) -> None:
    for name in ("groups", "images"):
        with pytest.raises(RuntimeError, match=f"nms: {name} must be"):
            torch.ops.refdet.nms(torch.zeros(3, 4), torch.zeros(3), 0.5, -1, **{name: ids})


@compiled
def test_the_operator_is_registered_well() -> None:
    problem = scene(90, 3, 2)
    options = {"groups": problem.groups, "images": problem.images}
    torch.library.opcheck(torch.ops.refdet.nms.default, (problem.boxes, problem.scores, 0.5, 10), options)


@compiled
def test_traces_whole() -> None:
    def chosen(boxes: Tensor, scores: Tensor, groups: Tensor, images: Tensor) -> Tensor:
        return boxes[nms(boxes, scores, 0.5, 10, groups=groups, images=images)] * 2

    problem = scene(90, 3, 2)
    arguments = (problem.boxes, problem.scores, problem.groups, problem.images)
    traced = torch.compile(chosen, backend="eager", fullgraph=True)
    assert traced(*arguments).equal(chosen(*arguments))


@cuda
@pytest.mark.parametrize("max_keep", [-1, 1, 300])
def test_cuda_over_many_slabs(max_keep: int) -> None:
    problem = scene(9001, 2, 3, max_keep=max_keep)
    assert problem.solve(nms, "cuda") == problem.solve(nms)
