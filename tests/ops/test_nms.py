"""`nms` of one group: kernel and fallback equal brute force and torchvision; loading of the extension."""

from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import refdet
from refdet.ops._library import DEVICES, load
from refdet.ops.nms import BLOCK, nms, nms_plain

pytestmark = pytest.mark.slow

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
cuda = pytest.mark.gpu(kernels=True)
kernel_and_fallback = pytest.mark.parametrize("function", [nms, nms_plain])


def brute_force(boxes: Tensor, scores: Tensor, threshold: float, max_keep: int) -> list[int]:
    """Greedy suppression over all pairs, in numpy, one float32 operation at a time."""
    box, score = boxes.numpy(), scores.numpy()
    x1, y1, x2, y2 = box.T
    area = (x2 - x1) * (y2 - y1)
    kept: list[int] = []
    for i in sorted(range(len(box)), key=lambda i: (np.inf if np.isnan(score[i]) else -score[i], i)):
        width = np.maximum(np.minimum(x2[i], x2[kept]) - np.maximum(x1[i], x1[kept]), np.float32(0))
        height = np.maximum(np.minimum(y2[i], y2[kept]) - np.maximum(y1[i], y1[kept]), np.float32(0))
        overlap = width * height
        with np.errstate(invalid="ignore"):
            iou = overlap / (area[i] + area[kept] - overlap)
        if not (iou > np.float32(threshold)).any():
            kept.append(i)
    return kept if max_keep < 0 else kept[:max_keep]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float, int]:
    """Boxes on a grid or anywhere, some empty or NaN; scores with ties, infinities, NaN and both zeros."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([0, 1, 2, 7, 63, 64, 65, 129, 300]))
    corner = random.uniform(0, draw(st.sampled_from([4, 40, 400])), (count, 2))
    boxes = np.hstack((corner, corner + random.uniform(0, 30, (count, 2))))
    if draw(st.booleans()):
        boxes = boxes.round()
    scores = random.random(count)
    if draw(st.booleans()):
        scores = np.round(scores, 1)
    if draw(st.booleans()):
        odd = random.random(count) < 0.2
        scores[odd] = random.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0], odd.sum())
        boxes[random.random((count, 4)) < 0.02] = np.nan
    threshold = draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
    max_keep = draw(st.sampled_from([-1, 0, 1, 20, 1000]))
    return torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), threshold, max_keep


@kernel_and_fallback
@settings(max_examples=80, deadline=None, derandomize=True)
@given(problem=problems())
def test_nms_equals_brute_force(function: Callable[..., Tensor], problem: tuple[Tensor, Tensor, float, int]) -> None:
    assert function(*problem).tolist() == brute_force(*problem)


def overlapping_boxes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) of which many overlap, and scores (N,)."""
    random = torch.Generator().manual_seed(seed)
    center = torch.randint(0, 300, (count, 2), generator=random).float()
    size = torch.rand(count, 2, generator=random) * 60 + 5
    return torch.cat((center - size / 2, center + size / 2), dim=1), torch.rand(count, generator=random)


@kernel_and_fallback
def test_several_blocks_of_boxes_and_max_keep(function: Callable[..., Tensor]) -> None:
    boxes, scores = overlapping_boxes(3 * BLOCK + 11)
    everything = function(boxes, scores, 0.5)
    assert len(everything) > BLOCK // 2
    assert everything.tolist() == torchvision.ops.nms(boxes, scores, 0.5).tolist()
    for stop in (1, BLOCK // 2, len(everything) - 1):
        assert function(boxes, scores, 0.5, stop).tolist() == everything[:stop].tolist()


@kernel_and_fallback
def test_an_iou_of_exactly_the_threshold_is_not_above_it(function: Callable[..., Tensor]) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1], [0, 0, 4, 1]])  # IoU with the first: 3/10 and 4/10
    assert function(boxes, torch.tensor([3.0, 2, 1]), 0.3).tolist() == [0, 1]


@kernel_and_fallback
def test_equal_scores_are_ordered_by_index(function: Callable[..., Tensor]) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    assert function(boxes, torch.tensor([-0.0, 0.0, 0.0]), 0.5).tolist() == [0, 1]


def test_strided_inputs_and_other_dtypes() -> None:
    boxes, scores = overlapping_boxes(200)
    expected = nms(boxes, scores, 0.5)
    wide = torch.zeros(200, 8)
    wide[:, ::2] = boxes
    assert nms(wide[:, ::2], scores, 0.5).equal(expected)
    assert nms(boxes.t().contiguous().t(), scores.expand(3, 200).t()[:, 0], 0.5).equal(expected)
    assert nms(boxes.double(), scores.double(), 0.5).equal(expected)
    assert nms(boxes.requires_grad_(), scores, 0.5).equal(expected)
    half = boxes.detach().half()
    assert nms(half, scores, 0.5).equal(nms(half.float(), scores, 0.5))


@pytest.mark.parametrize(
    ("boxes", "scores", "threshold", "error", "text"),
    [
        (torch.zeros(3, 5), torch.zeros(3), 0.5, ValueError, r"boxes \(N, 4\), got \(3, 5\)"),
        (torch.zeros(4), torch.zeros(1), 0.5, ValueError, r"boxes \(N, 4\), got \(4,\)"),
        (torch.zeros(3, 4), torch.zeros(2), 0.5, ValueError, r"scores \(3,\), one per box, got \(2,\)"),
        (torch.zeros(3, 4), torch.zeros(3, 1), 0.5, ValueError, r"scores \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(3).long(), 0.5, TypeError, "floating-point"),
        (torch.zeros(3, 4), torch.zeros(3, device="meta"), 0.5, ValueError, "one device"),
        (torch.zeros(3, 4), torch.zeros(3), 1.5, ValueError, "0..1, got 1.5"),
        (torch.zeros(3, 4), torch.zeros(3), float("nan"), ValueError, "0..1, got nan"),
    ],
)
def test_invalid_arguments_are_refused(boxes: Tensor, scores: Tensor, threshold: float, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        nms(boxes, scores, threshold)


@compiled
@pytest.mark.parametrize(
    ("boxes", "scores"),
    [
        (torch.zeros(3, 5), torch.zeros(3)),
        (torch.zeros(3, 4), torch.zeros(2)),
        (torch.zeros(3, 4).double(), torch.zeros(3).double()),
    ],
)
def test_the_operator_refuses_invalid_arguments(boxes: Tensor, scores: Tensor) -> None:
    with pytest.raises(RuntimeError, match="nms: "):
        torch.ops.refdet.nms(boxes, scores, 0.5, -1)


@compiled
def test_the_operator_passes_opcheck() -> None:
    boxes, scores = overlapping_boxes(50)
    torch.library.opcheck(torch.ops.refdet.nms.default, (boxes, scores, 0.5, 10))


@compiled
def test_nms_compiles_into_one_graph() -> None:
    def double_kept_boxes(boxes: Tensor, scores: Tensor) -> Tensor:
        return boxes[nms(boxes, scores, 0.5, 10)] * 2

    boxes, scores = overlapping_boxes(50)
    traced = torch.compile(double_kept_boxes, backend="eager", fullgraph=True)
    assert traced(boxes, scores).equal(double_kept_boxes(boxes, scores))


def test_an_extension_that_does_not_load_gives_a_warning(tmp_path: Path) -> None:
    assert load(tmp_path) == frozenset()
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="Reinstall refdet"):
        assert load(tmp_path) == frozenset()


@compiled
def test_an_extension_built_from_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its RoI pooling has no autograd kernel: the gradient was in Python then."""
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.warns(UserWarning, match="older sources.*Reinstall refdet"):
        assert load(Path(refdet.__file__).parent) == frozenset()


@cuda
@settings(max_examples=80, deadline=None, derandomize=True)
@given(problem=problems())
def test_cuda_nms_equals_brute_force(problem: tuple[Tensor, Tensor, float, int]) -> None:
    boxes, scores, threshold, max_keep = problem
    assert nms(boxes.cuda(), scores.cuda(), threshold, max_keep).tolist() == brute_force(*problem)


@cuda
@pytest.mark.parametrize("max_keep", [-1, 1, 1000])
def test_cuda_nms_of_many_boxes(max_keep: int) -> None:
    boxes, scores = overlapping_boxes(7001)
    found = nms(boxes.cuda(), scores.cuda(), 0.5, max_keep)
    assert found.cpu().equal(nms(boxes, scores, 0.5, max_keep))
