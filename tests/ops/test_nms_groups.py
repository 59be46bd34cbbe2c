"""NMS of many images and groups in one call."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refdet.ops._library import DEVICES
from refdet.ops.nms import BLOCK, nms, nms_plain

pytestmark = pytest.mark.slow

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
cuda = pytest.mark.gpu(kernels=True)
both = pytest.mark.parametrize("function", [nms, nms_plain])


@dataclass(frozen=True)
class Problem:
    """The arguments of one call."""

    boxes: Tensor
    scores: Tensor
    threshold: float
    max_keep: int
    groups: Tensor | None
    images: Tensor | None

    def solve(self, function: Callable[..., Tensor], device: str = "cpu") -> list[int]:
        groups, images = (None if ids is None else ids.to(device) for ids in (self.groups, self.images))
        boxes, scores = self.boxes.to(device), self.scores.to(device)
        return function(boxes, scores, self.threshold, self.max_keep, groups=groups, images=images).tolist()

    def brute_force(self) -> list[int]:
        """One pair after the other, in numpy, one float32 operation at a time."""
        boxes, scores = self.boxes.numpy(), self.scores.numpy()
        nothing = np.zeros(len(boxes), np.int64)
        groups = nothing if self.groups is None else self.groups.numpy()
        images = nothing if self.images is None else self.images.numpy()
        zero = np.float32(0)
        answer: list[int] = []
        for image in sorted(set(images.tolist())):
            rows = np.flatnonzero(images == image).tolist()
            kept: list[int] = []
            for i in sorted(rows, key=lambda i: (np.inf if np.isnan(scores[i]) else -scores[i], i)):
                if 0 <= self.max_keep <= len(kept):
                    break
                others = [j for j in kept if groups[j] == groups[i]]
                (x1, y1, x2, y2), (ox1, oy1, ox2, oy2) = boxes[i], boxes[others].T
                with np.errstate(all="ignore"):
                    width = np.maximum(np.minimum(x2, ox2) - np.maximum(x1, ox1), zero)
                    height = np.maximum(np.minimum(y2, oy2) - np.maximum(y1, oy1), zero)
                    area = (x2 - x1) * (y2 - y1)
                    other_area = (ox2 - ox1) * (oy2 - oy1)
                    iou = width * height / (area + other_area - width * height)
                if not (iou > np.float32(self.threshold)).any():
                    kept.append(i)
            answer += kept
        return answer


IDS = ([0], [0, 1, 2], [5, -3, 40, 7], [-(2**63), 2**63 - 1, 0, -1], [2**40, 2**40 + 1])
ODD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -0.0]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Few places for many boxes, so that they overlap; some have no area, a side of less than 0, or odd numbers."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([0, 1, 2, 31, 33, 64, 65, 129, 260]))
    corner = random.uniform(0, draw(st.sampled_from([4, 40])), (count, 2))
    boxes = np.hstack((corner, corner + random.uniform(draw(st.sampled_from([0, -3])), 30, (count, 2))))
    if draw(st.booleans()):
        boxes = boxes.round()
    boxes *= draw(st.sampled_from([1, 1, 1e-21, 1e18]))  # areas that are denormal, or infinite
    scores = random.random(count)
    if draw(st.booleans()):
        scores = scores.round(1)
    if draw(st.booleans()):
        odd = random.random(boxes.shape) < 0.03
        boxes[odd] = random.choice(ODD, odd.sum())
        odd = random.random(count) < 0.2
        scores[odd] = random.choice(ODD, odd.sum())
    groups, images = (
        torch.from_numpy(random.choice(np.array(ids, np.int64), count)) if ids else None
        for ids in (draw(st.sampled_from([None, *IDS])), draw(st.sampled_from([None, *IDS])))
    )
    threshold = draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
    max_keep = draw(st.sampled_from([-1, 0, 1, 20, 1000]))
    tensors = torch.from_numpy(boxes).float(), torch.from_numpy(scores).float()
    return Problem(*tensors, threshold, max_keep, groups, images)


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


def scene(count: int, groups: int, images: int, max_keep: int = -1) -> Problem:
    random = torch.Generator().manual_seed(count)
    centre = torch.randint(0, 200, (count, 2), generator=random).float()
    size = torch.rand(count, 2, generator=random) * 60 + 5
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=1)
    scores = torch.rand(count, generator=random)
    ids = (torch.randint(0, number, (count,), generator=random) for number in (groups, images))
    return Problem(boxes, scores, 0.4, max_keep, *ids)


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
        (torch.zeros(2, dtype=torch.int64), ValueError, r"\(3,\), one a box, got \(2,\)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"\(3,\), one a box"),
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


def test_without_the_extension_the_answer_is_the_same() -> None:
    script = """
import torch
from refdet.ops._library import DEVICES
from refdet.ops.nms import nms
boxes = torch.arange(800.0).reshape(200, 4) % 37
boxes[:, 2:] += boxes[:, :2]
places = torch.arange(200)
print("cpu" in DEVICES)
print(nms(boxes, boxes[:, 0] / 37, 0.3, 20, groups=places % 3, images=places % 5).tolist())
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({**os.environ, "REFDET_NO_EXT": "1"}, dict(os.environ))
    ]
    (without, plain), (_, found) = (run.splitlines() for run in runs)
    assert without == "False" and plain == found


@cuda
@pytest.mark.parametrize("max_keep", [-1, 1, 300])
def test_cuda_over_many_slabs(max_keep: int) -> None:
    problem = scene(9001, 2, 3, max_keep=max_keep)
    assert problem.solve(nms, "cuda") == problem.solve(nms)
