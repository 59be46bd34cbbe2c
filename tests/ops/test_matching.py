"""`match_boxes`: the kernel and the fallback equal a numpy reference that compares one pair at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from refdet.ops._library import DEVICES
from refdet.ops.matching import Matches, match_boxes, match_boxes_plain

pytestmark = pytest.mark.slow

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
cuda = pytest.mark.gpu(kernels=True)
kernel_and_fallback = pytest.mark.parametrize("function", [match_boxes, match_boxes_plain])
f32 = np.float32


def some_boxes(random: np.random.Generator, count: int, grid: int, odd: bool) -> Tensor:
    """Overlapping boxes, a few of them reversed; a grid makes many IoUs equal, and `odd` adds NaN, inf and the like."""
    corner = random.uniform(-20, 50, (count, 2))
    boxes = np.hstack((corner, corner + random.uniform(-1, 30, (count, 2))))
    if grid:
        boxes = np.round(boxes / grid) * grid
    if odd:
        at = random.random(boxes.shape) < 0.1
        boxes[at] = random.choice([np.nan, np.inf, -np.inf, 1e30, -3e38, 1e-40, -0.0], at.sum())
    return torch.from_numpy(boxes.astype(np.float32))


@st.composite
def problems(draw: st.DrawFn, most: int = 300) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    grid, odd = draw(st.sampled_from([0, 1, 5])), draw(st.booleans())
    count = draw(st.sampled_from([0, 1, 5, 63, 64, 65, most]))
    return some_boxes(random, count, grid, odd), some_boxes(random, draw(st.sampled_from([0, 1, 2, 9])), grid, odd)


def iou_of_pair(a: np.ndarray, b: np.ndarray) -> f32:
    """IoU of two boxes, one float32 operation at a time, as the kernel computes it."""
    width = np.fmax(np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]), f32(0))
    height = np.fmax(np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]), f32(0))
    overlap = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / np.fmax(union, f32(1e-12)) if union > 0 else f32(0)


def match_pair_by_pair(candidates: Tensor, objects: Tensor) -> Matches:
    """Candidates (N, 4) and objects (G, 4), from a table of all IoUs."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        table = np.array([[iou_of_pair(a, b) for b in objects.numpy()] for a in candidates.numpy()], np.float32)
    table = table.reshape(len(candidates), len(objects))
    max_iou, matched, is_best = [], [], []
    best_of_objects = [max((float(x) for x in column), default=0.0) for column in table.T]
    for row in table.tolist():
        max_iou.append(max(row, default=0.0))
        matched.append(row.index(max_iou[-1]) if row else 0)
        is_best.append(any(value == best > 0 for value, best in zip(row, best_of_objects, strict=True)))
    return Matches(torch.tensor(max_iou), torch.tensor(matched).long(), torch.tensor(is_best, dtype=torch.bool))


def assert_same(found: Matches, expected: Matches) -> None:
    for name, value in expected._asdict().items():
        assert getattr(found, name).cpu().equal(value), name


@kernel_and_fallback
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(most=100))
def test_matches_equal_pair_by_pair(function: Callable[..., Matches], problem: tuple[Tensor, Tensor]) -> None:
    assert_same(function(*problem), match_pair_by_pair(*problem))


@compiled
@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(most=2500))
def test_kernel_and_fallback_give_the_same_matches(problem: tuple[Tensor, Tensor]) -> None:
    assert_same(match_boxes(*problem), match_boxes_plain(*problem))


@kernel_and_fallback
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), images=st.integers(0, 4), count=st.sampled_from([0, 1, 65, 600]),
       object_count=st.integers(0, 5), shared=st.booleans())  # fmt: skip
def test_matches_of_a_batch_are_those_of_each_image(
    function: Callable[..., Matches], seed: int, images: int, count: int, object_count: int, shared: bool
) -> None:
    random = np.random.default_rng(seed)
    candidates_of_images = [some_boxes(random, count, 1, True) for _ in range(1 if shared else images)]
    objects = [some_boxes(random, object_count, 1, True) for _ in range(images)]
    candidates = candidates_of_images[0] if shared else torch.stack([*candidates_of_images, torch.zeros(count, 4)])[:-1]
    found = function(candidates, torch.stack([*objects, torch.zeros(object_count, 4)])[:-1])
    assert all(value.shape == (images, count) for value in found)
    for image in range(images):
        expected = function(candidates_of_images[0 if shared else image], objects[image])
        assert_same(Matches(*(value[image] for value in found)), expected)


def rows_of_boxes(count: int) -> tuple[Tensor, Tensor]:
    """Candidates in rows as anchors are, several chunks of them, and objects among them."""
    random = np.random.default_rng(3)
    at = torch.arange(count)
    corner = torch.stack((at % 97, at // 97), dim=1) * 4.0
    candidates = torch.cat((corner, corner + 8 + 8 * (at % 3)[:, None]), dim=1)
    return candidates, candidates[random.integers(0, count, 40)] + torch.from_numpy(
        random.normal(0, 3, (40, 4))
    ).float()


def test_many_candidates_match_as_by_torchvisions_iou() -> None:
    candidates, objects = rows_of_boxes(9001)
    found, overlaps = match_boxes(candidates, objects), box_iou(candidates.double(), objects.double())
    assert found.max_iou.double().allclose(overlaps.amax(dim=1), atol=1e-6)
    chosen = overlaps.gather(1, found.object[:, None])[:, 0]
    assert chosen.allclose(overlaps.amax(dim=1), atol=1e-6)
    assert found.is_best[overlaps.argmax(dim=0)].float().mean() > 0.9  # rounding breaks or makes some ties
    assert_same(found, match_boxes_plain(candidates, objects))


def test_ties_mark_every_best_candidate_and_match_the_first_object() -> None:
    same = torch.tensor([[0.0, 0, 10, 10]])
    far = torch.tensor([[900.0, 900, 910, 910]])
    candidates = torch.cat((far, same + 1, far.expand(2000, -1), same + 1, same))
    found = match_boxes(candidates, torch.cat((far + 500, same - 1, same - 1)))
    assert found.is_best.nonzero()[:, 0].tolist() == [2003]
    found = match_boxes(candidates[:-1], torch.cat((far + 500, same - 1, same - 1)))
    assert found.is_best.nonzero()[:, 0].tolist() == [1, 2002]
    assert found.object.unique().tolist() == [0, 1] and found.object[1] == found.object[2002] == 1
    assert found.max_iou[1] == found.max_iou[2002] == f32(64) / f32(136)


@kernel_and_fallback
def test_no_candidates_or_no_objects(function: Callable[..., Matches]) -> None:
    some = torch.tensor([[0.0, 0, 5, 5]] * 3)
    found = function(some, some[:0])
    assert [value.tolist() for value in found] == [[0.0] * 3, [0] * 3, [False] * 3]
    assert [value.tolist() for value in function(some[:0], some)] == [[], [], []]
    assert [len(value) for value in function(some[:0], some[:0])] == [0] * 3
    assert [value.dtype for value in found] == [torch.float32, torch.int64, torch.bool]


def test_strided_boxes_and_other_dtypes() -> None:
    candidates, objects = rows_of_boxes(500)
    candidates, objects = candidates.round(), objects.round()  # bfloat16 holds them
    candidates = candidates[(candidates <= 256).all(dim=1)]
    objects = objects[(objects.abs() <= 256).all(dim=1)]
    expected = match_boxes_plain(candidates, objects)
    assert expected.is_best.any()
    wide = torch.zeros(len(candidates), 9)
    wide[:, 1::2] = candidates
    for a in (wide[:, 1::2], candidates.bfloat16(), candidates.double(), candidates.clone().requires_grad_()):
        for b in (objects.t().contiguous().t(), objects.bfloat16(), objects.double()):
            found = match_boxes(a, b)
            assert_same(found, expected)
            assert not found.max_iou.requires_grad


@pytest.mark.parametrize(
    ("candidates", "objects", "error", "text"),
    [
        (torch.zeros(3, 5), torch.zeros(2, 4), ValueError, r"got \(3, 5\) and \(2, 4\)"),
        (torch.zeros(3, 4), torch.zeros(4), ValueError, r"got \(3, 4\) and \(4,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), ValueError, "of the same images"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), ValueError, "of the same images"),
        (torch.zeros(3, 4).int(), torch.zeros(2, 4), TypeError, "int32"),
        (torch.zeros(3, 4), torch.zeros(2, 4).long(), TypeError, "int64"),
        (torch.zeros(3, 4), torch.zeros(2, 4, device="meta"), ValueError, "cpu and meta"),
    ],
)
def test_invalid_boxes_are_refused(candidates: Tensor, objects: Tensor, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        match_boxes(candidates, objects)


@compiled
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("bad", [torch.zeros(3, 5), torch.zeros(4), torch.zeros(3, 4).double()])
def test_the_operator_refuses_invalid_boxes(at: int, bad: Tensor) -> None:
    arguments = [torch.zeros(3, 4), torch.zeros(2, 4)]
    arguments[at] = bad
    with pytest.raises(RuntimeError, match="match_boxes: "):
        torch.ops.refdet.match_boxes(*arguments)


@compiled
def test_the_operator_refuses_batches_of_different_sizes() -> None:
    for candidates, objects in (
        (torch.zeros(2, 3, 4), torch.zeros(2, 4)),
        (torch.zeros(2, 3, 4), torch.zeros(3, 3, 4)),
    ):
        with pytest.raises(RuntimeError, match="same number of images"):
            torch.ops.refdet.match_boxes(candidates, objects)


@compiled
def test_the_operator_passes_opcheck_and_compiles() -> None:
    candidates, objects = rows_of_boxes(300)
    torch.library.opcheck(torch.ops.refdet.match_boxes.default, (candidates, objects))
    torch.library.opcheck(torch.ops.refdet.match_boxes.default, (candidates, objects.expand(2, -1, -1)))

    def weigh_boxes(candidates: Tensor, objects: Tensor) -> Tensor:
        found = match_boxes(candidates, objects * 1.5)
        return objects[found.object] * found.max_iou[:, None] + found.is_best[:, None]

    traced = torch.compile(weigh_boxes, backend="eager", fullgraph=True)
    assert traced(candidates, objects).equal(weigh_boxes(candidates, objects))


@compiled
def test_matches_do_not_depend_on_the_number_of_threads() -> None:
    problem = rows_of_boxes(9001)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(match_boxes(*problem))
    finally:
        torch.set_num_threads(before)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@cuda
@settings(max_examples=80, deadline=None, derandomize=True)
@given(problem=problems(most=2500))
def test_cuda_gives_what_the_fallback_gives(problem: tuple[Tensor, Tensor]) -> None:
    assert_same(match_boxes(problem[0].cuda(), problem[1].cuda()), match_boxes_plain(*problem))


@cuda
def test_cuda_matches_a_batch_with_shared_or_separate_candidates() -> None:
    candidates, objects = rows_of_boxes(9001)
    batch = torch.stack([objects + shift for shift in range(3)])
    for shared in (candidates, torch.stack([candidates - shift for shift in range(3)])):
        assert_same(match_boxes(shared.cuda(), batch.cuda()), match_boxes_plain(shared, batch))


@cuda
def test_cuda_with_more_objects_than_a_block_holds() -> None:
    candidates, objects = rows_of_boxes(9001)
    objects = torch.cat([objects + shift for shift in range(20)])
    assert_same(match_boxes(candidates.cuda(), objects.cuda()), match_boxes_plain(candidates, objects))
