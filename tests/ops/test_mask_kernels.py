"""`masks_to_rle` and `mask_coverage`: kernels and fallbacks equal pycocotools and a reference for single pixels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_problems import KERNEL_ARGUMENTS, coded, compiled, f32, pasting_problems, some_boxes
from pycocotools import mask as coco_mask
from torch import Tensor

from refdet.ops.masks import mask_coverage, mask_coverage_plain, masks_to_rle, masks_to_rle_plain

pytestmark = pytest.mark.slow

cuda = pytest.mark.gpu
kernel_and_fallback = pytest.mark.parametrize("function", [masks_to_rle, masks_to_rle_plain])


def bilinear_weights(low: f32, high: f32, size: int, pixel: int) -> tuple[int, int, f32, f32] | None:
    """Two cells, along one axis, and their weights at a pixel center, in float32 step by step; None outside the box."""
    center = f32(pixel) + f32(0.5)
    if not (np.isfinite([low, high]).all() and low <= center < high):
        return None
    scale = f32(size / (float(high) - float(low)))
    position = min(max((center - low) * scale - f32(0.5), f32(0)), f32(size - 1))
    cell = int(position)
    lower = f32(1) - (position - f32(cell))
    return cell, min(cell + 1, size - 1), lower, f32(1) - lower


def paste_pixel_by_pixel(cells: np.ndarray, box: np.ndarray, height: int, width: int, threshold: float) -> np.ndarray:
    """The mask (height, width) of one prediction."""
    found = np.zeros((height, width), np.uint8)
    columns = [bilinear_weights(box[0], box[2], len(cells), x) for x in range(width)]
    for y in range(height):
        row = bilinear_weights(box[1], box[3], len(cells), y)
        for x, column in enumerate(columns):
            if row is None or column is None:
                continue
            (top, bottom, above, below), (left, right, before, after) = row, column
            upper = cells[top, left] * before + cells[top, right] * after
            lower = cells[bottom, left] * before + cells[bottom, right] * after
            found[y, x] = upper * above + lower * below >= f32(threshold)
    return found


def assert_encodes(found: list[bytes], masks: list[np.ndarray]) -> None:
    assert found == [rle["counts"] for rle in coded(masks)]


@kernel_and_fallback
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=pasting_problems())
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_rle_equals_the_mask_pasted_pixel_by_pixel(
    function: Callable[..., list[bytes]], problem: tuple[Tensor, Tensor, int, int, float]
) -> None:
    cells, boxes, *image = problem
    masks = [paste_pixel_by_pixel(c, b, *image) for c, b in zip(cells.numpy(), boxes.numpy(), strict=True)]
    assert_encodes(function(*problem), masks)


@compiled
@settings(max_examples=300, deadline=None, derandomize=True)
@given(problem=pasting_problems())
def test_kernel_and_fallback_give_the_same_rle(problem: tuple[Tensor, Tensor, int, int, float]) -> None:
    assert masks_to_rle(*problem) == masks_to_rle_plain(*problem)


def predictions_of_masks(masks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Cells and boxes that paste exactly to given masks (N, m, m) in an image of m x m pixels."""
    size = masks.shape[1]
    return torch.from_numpy(masks.astype(np.float32)), torch.tensor([[0.0, 0, size, size]]).expand(len(masks), -1)


@kernel_and_fallback
@pytest.mark.parametrize("size", [1, 2, 3, 17, 70])
def test_runs_of_every_kind_are_encoded_like_pycocotools(function: Callable[..., list[bytes]], size: int) -> None:
    """Whole columns, runs over several columns, first and last pixels, empty and full masks."""
    random = np.random.default_rng(size)
    dense = [random.random((60, size, size)) < share for share in (0.02, 0.5, 0.98)]
    stripes = np.zeros((60, size, size), bool)
    for stripe in stripes:
        for start in random.integers(0, size * size, 3):
            stripe.T.reshape(-1)[start : start + random.integers(0, 3 * size)] = True
    masks = np.concatenate((*dense, stripes, np.zeros((1, size, size)), np.ones((1, size, size)))).astype(np.uint8)
    masks = np.concatenate((masks, stripes.transpose(0, 2, 1).astype(np.uint8)))
    assert_encodes(function(*predictions_of_masks(masks), size, size), list(masks))


@kernel_and_fallback
def test_long_runs_are_encoded_in_several_characters(function: Callable[..., list[bytes]]) -> None:
    found = function(torch.ones(2, 2, 2), torch.tensor([[0.0, 7, 3000, 4000], [1, 0, 2999, 4000]]), 4000, 3000)
    masks = np.zeros((2, 4000, 3000), np.uint8)
    masks[0, 7:], masks[1, :, 1:2999] = 1, 1
    assert_encodes(found, list(masks))


@kernel_and_fallback
def test_masks_in_an_image_of_one_pixel(function: Callable[..., list[bytes]]) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.6, 0, 1, 1], [-9, -9, 9, 9], [0.5, 0.5, 0.5, 0.5]])
    found = function(torch.full((4, 1, 1), 0.5), boxes, 1, 1)
    assert_encodes(found, [np.full((1, 1), value, np.uint8) for value in (1, 0, 1, 0)])


def test_rle_of_strided_inputs_and_other_dtypes() -> None:
    random = torch.Generator().manual_seed(0)
    cells = torch.rand(6, 14, 28, generator=random)[:, :, ::2].bfloat16()
    boxes = (torch.rand(8, 6, generator=random) * 20).t()[:, 1:5]
    boxes = boxes + torch.tensor([0.0, 0, 20, 20])
    expected = masks_to_rle_plain(cells.float().contiguous(), boxes.contiguous(), 30, 40)
    for values in (cells, cells.float(), cells.double(), cells.float().requires_grad_(), cells.transpose(1, 2).mT):
        assert masks_to_rle(values, boxes, 30, 40) == expected
    assert masks_to_rle(cells, boxes.double(), 30, 40) == expected
    assert masks_to_rle(cells, boxes.t().contiguous().t(), 30, 40) == expected


@pytest.mark.parametrize(
    ("cells", "boxes", "more", "error", "text"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(3, 4), (9, 9), ValueError, r"\(N, m, m\), got \(3, 4, 5\)"),
        (torch.zeros(3, 0, 0), torch.zeros(3, 4), (9, 9), ValueError, r"\(N, m, m\), got \(3, 0, 0\)"),
        (torch.zeros(3, 4), torch.zeros(3, 4), (9, 9), ValueError, r"\(N, m, m\), got \(3, 4\)"),
        (torch.zeros(3, 4, 4), torch.zeros(2, 4), (9, 9), ValueError, r"boxes \(3, 4\), one per mask, got \(2, 4\)"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 5), (9, 9), ValueError, r"got \(3, 5\)"),
        (torch.zeros(3, 4, 4).int(), torch.zeros(3, 4), (9, 9), TypeError, "floating-point"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4).long(), (9, 9), TypeError, "floating-point"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, device="meta"), (9, 9), ValueError, "one device"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4), (0, 9), ValueError, "0 x 9 pixels"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4), (2**16, 2**16), ValueError, "has no RLE"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4), (9, 9, 1.5), ValueError, "0..1, got 1.5"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4), (9, 9, float("nan")), ValueError, "0..1, got nan"),
    ],
)
def test_invalid_masks_are_refused(cells: Tensor, boxes: Tensor, more: tuple, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        masks_to_rle(cells, boxes, *more)


@st.composite
def coverage_problems(draw: st.DrawFn) -> tuple[list[dict], Tensor, Tensor, int]:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    height, width, count = draw(st.integers(1, 60)), draw(st.integers(1, 60)), draw(st.sampled_from([0, 1, 6, 30]))
    masks = random.random((4, height, width)) < draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
    masks[:2] = np.cumsum(masks[:2], axis=1) % 2  # longer runs
    boxes = torch.from_numpy(some_boxes(random, count, draw(st.booleans()))).double()
    objects = torch.from_numpy(random.integers(0, 4, count))
    return coded(masks), objects, boxes, draw(st.sampled_from([1, 2, 3, 7, 14, 28]))


@compiled
@settings(max_examples=300, deadline=None, derandomize=True)
@given(problem=coverage_problems())
def test_kernel_and_fallback_give_the_same_coverage(problem: tuple[list[dict], Tensor, Tensor, int]) -> None:
    found, expected = mask_coverage(*problem), mask_coverage_plain(*problem)
    assert found.equal(expected)
    assert ((found >= 0) & (found <= 1)).all()
    not_finite = ~problem[2].isfinite().all(dim=1)
    assert found[not_finite].eq(0).all()


def test_coverage_of_compressed_and_uncompressed_rle() -> None:
    polygon = [[3.2, 4.1, 30.5, 8.8, 22.0, 35.9, 8.3, 30.2], [31.0, 31.0, 38.0, 31.5, 35.0, 38.2]]
    compressed = coco_mask.merge(coco_mask.frPyObjects(polygon, 40, 50))
    mask = coco_mask.decode(compressed)
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], ends, [flat.size]))).tolist()
    uncompressed = coco_mask.frPyObjects({"size": [40, 50], "counts": counts}, 40, 50)
    boxes = torch.tensor([[3.0, 4.0, 39.0, 39.0], [10.5, 9.5, 24.5, 37.5]])
    expected = mask_coverage_plain(coded(mask[None]), torch.tensor([0, 0]), boxes.double(), 14)
    for rle in (compressed, uncompressed):
        assert mask_coverage([rle], torch.tensor([0, 0]), boxes, 14).equal(expected)
    assert 0.2 < expected.mean() < 0.9


def test_coverage_of_strided_inputs_and_other_dtypes() -> None:
    rles = coded(np.random.default_rng(0).random((3, 20, 30)) < 0.5)
    wide = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) * 10
    wide[:, 4:] += 12
    objects = torch.tensor([[0, 1, 2, 2, 1, 0]] * 2).t()[:, 0]
    expected = mask_coverage(rles, objects.contiguous(), wide[:, ::2][:, :4].contiguous(), 7)
    assert expected.sum() > 0
    assert mask_coverage(rles, objects, wide[:, ::2][:, :4], 7).equal(expected)
    assert mask_coverage(rles, objects.int(), wide[:, ::2][:, :4].double().requires_grad_(), 7).equal(expected)


@pytest.mark.parametrize(
    ("objects", "boxes", "size", "text"),
    [
        ([0, 1], torch.zeros(1, 4), 7, r"got \(1, 4\) and \(2,\)"),
        ([0], torch.zeros(1, 5), 7, r"got \(1, 5\)"),
        ([0], torch.zeros(1, 4), 0, "size of 0"),
        ([2], torch.zeros(1, 4), 7, "objects: indices 2 to 2 are out of range for 2"),
        ([-1], torch.zeros(1, 4), 7, "objects: indices -1 to -1 are out of range for 2"),
    ],
)
def test_invalid_arguments_of_coverage_are_refused(objects: list[int], boxes: Tensor, size: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mask_coverage(coded(np.ones((2, 9, 9))), torch.tensor(objects), boxes, size)


def test_masks_of_different_sizes_are_refused() -> None:
    rles = coded(np.ones((1, 9, 9))) + coded(np.ones((1, 9, 8)))
    with pytest.raises(ValueError, match="differ in size"):
        mask_coverage(rles, torch.tensor([0]), torch.zeros(1, 4), 7)


@compiled
@pytest.mark.parametrize("counts", [b"", b"P", b"0150", b"01500000005", b"\xff\x00", b"ooooooooo0", b"1J", b"OOOO"])
def test_rle_that_does_not_fill_its_image_exactly_is_refused(counts: bytes) -> None:
    rles = [*coded(np.ones((1, 5, 5))), {"size": [5, 5], "counts": counts}]
    with pytest.raises(ValueError, match="mask 1 (is not valid RLE|does not match its image size) of 5 x 5"):
        mask_coverage(rles, torch.tensor([0, 1]), torch.tensor([[0.0, 0, 5, 5]] * 2), 7)


@st.composite
def damaged_counts(draw: st.DrawFn) -> bytes:
    """The counts of a random mask of 4 x 6 pixels, with up to two bytes replaced by characters of the encoding."""
    pixels = draw(st.lists(st.booleans(), min_size=24, max_size=24))
    counts = bytearray(coded(np.array(pixels).reshape(1, 4, 6))[0]["counts"])
    for _ in range(draw(st.integers(0, 2))):
        counts[draw(st.integers(0, len(counts) - 1))] = draw(st.integers(48, 111))
    return bytes(counts)


@compiled
@settings(max_examples=500, deadline=None, derandomize=True)
@given(counts=damaged_counts() | st.binary(max_size=12))
def test_damaged_rle_is_refused_or_read_like_the_fallback_does(counts: bytes) -> None:
    box, rles = torch.tensor([[0.0, 0, 6, 4]]), [{"size": [4, 6], "counts": counts}]
    try:
        found = mask_coverage(rles, torch.tensor([0]), box, 3)
    except ValueError:
        return
    assert found.equal(mask_coverage_plain(rles, torch.tensor([0]), box.double(), 3))


@compiled
@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("masks_to_rle", 0, torch.rand(5, 14, 13)),
        ("masks_to_rle", 0, torch.rand(5, 14, 14).double()),
        ("masks_to_rle", 1, torch.rand(4, 4)),
        ("masks_to_rle", 1, torch.rand(5, 4).double()),
        ("masks_to_rle", 2, 0),
        ("masks_to_rle", 2, 2**62),
        ("masks_to_rle", 4, 2.0),
        ("mask_coverage", 0, torch.zeros(10)),
        ("mask_coverage", 1, torch.tensor([0, 11])),
        ("mask_coverage", 1, torch.tensor([-1, 10])),
        ("mask_coverage", 1, torch.zeros(0).long()),
        ("mask_coverage", 3, -5),
        ("mask_coverage", 4, torch.zeros(3, 4)),
        ("mask_coverage", 5, torch.ones(3).long()),
        ("mask_coverage", 5, torch.zeros(2).long()),
        ("mask_coverage", 6, 0),
    ],
)
def test_operators_refuse_invalid_arguments(name: str, at: int, value: object) -> None:
    arguments = list(KERNEL_ARGUMENTS[name])
    arguments[at] = value
    with pytest.raises(RuntimeError, match=f"{name}: "):
        getattr(torch.ops.refdet, name)(*arguments)


@compiled
@pytest.mark.parametrize("name", list(KERNEL_ARGUMENTS))
def test_operators_pass_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.refdet, name).default, KERNEL_ARGUMENTS[name])


@compiled
def test_operators_compile_into_one_graph() -> None:
    def encode(cells: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        counts, starts = torch.ops.refdet.masks_to_rle(cells * 1.5 - 0.25, boxes, 40, 30, 0.5)
        return counts.to(torch.int64) * 2, starts.diff()

    def cover(*given: Tensor) -> Tensor:
        counts, starts, boxes, objects = given
        return torch.ops.refdet.mask_coverage(counts, starts, 5, 5, boxes * 0.5, objects, 7) >= 0.5

    cells, boxes, *_ = KERNEL_ARGUMENTS["masks_to_rle"]
    traced = torch.compile(encode, backend="eager", fullgraph=True)
    assert all(a.equal(b) for a, b in zip(traced(cells, boxes), encode(cells, boxes), strict=True))
    given = [value for value in KERNEL_ARGUMENTS["mask_coverage"] if isinstance(value, Tensor)]
    assert torch.compile(cover, backend="eager", fullgraph=True)(*given).equal(cover(*given))


@compiled
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    random = np.random.default_rng(0)
    cells, boxes = (
        torch.from_numpy(random.random((33, 14, 14))).float(),
        torch.from_numpy(some_boxes(random, 33, False)),
    )
    rles = coded(random.random((33, 40, 50)) < 0.5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            covered = mask_coverage(rles, torch.arange(33), boxes, 14)
            found.append((masks_to_rle(cells, boxes, 40, 50), covered.tolist()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@cuda
def test_cuda_tensors_give_the_results_of_the_cpu() -> None:
    cells, boxes, *image = KERNEL_ARGUMENTS["masks_to_rle"]
    assert masks_to_rle(cells.cuda(), boxes.cuda(), *image) == masks_to_rle(cells, boxes, *image)
    rles, objects = coded(np.eye(5)[None]), torch.zeros(5).long()
    found = mask_coverage(rles, objects.cuda(), boxes.cuda(), 7)
    assert found.equal(mask_coverage(rles, objects, boxes, 7))
