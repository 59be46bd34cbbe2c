"""On a GPU, RoIs go through convolutions in a few padded chunks of few sizes, with the results of all RoIs at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detector_examples import CATEGORY_IDS, PYRAMID, VARIANTS, records_of, small_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from refdet.detector import roi_chunks, roi_heads
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.predictor import ImageFeatures, describe_boxes, detect_batch
from refdet.detector.roi_chunks import GPU_CHUNK_BYTES, MIN_SIZE, padded_size
from refdet.structures.detection_options import DetectionOptions

SINGLE, VGG = tuple(VARIANTS["dc5"]), tuple(VARIANTS["vgg16"])
HEADS = [(), tuple(PYRAMID), (*PYRAMID, "model.box_convs=2"), (*SINGLE, "model.box_convs=1"), VGG]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Shapes(TorchDispatchMode):
    """Collects the distinct shapes of convolutions; cuDNN plans each of them once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "conv" in func.overloadpacket.__name__:
            self.seen.add((func.overloadpacket.__name__, *(tuple(t.shape) for t in args[:2])))
        return func(*args, **(kwargs or {}))


def pad_as_on_gpu(monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> None:
    """Pad chunks on the CPU as on a GPU, with at most `most` RoIs each."""
    monkeypatch.setattr(roi_chunks, "PADDED_DEVICES", frozenset(("cpu", "cuda")))
    if most is not None:
        monkeypatch.setattr(roi_chunks, "_largest_size", lambda limit: most)


@given(count=st.integers(0, 3000), most=st.sampled_from([None, 1, 7, 83]))
def test_chunks_on_the_cpu_cover_each_roi_once(count: int, most: int | None) -> None:
    with torch.no_grad():
        chunks = roi_chunks.roi_chunks(count, CPU, 1, most)
    assert_complete(chunks, count)
    assert all(chunk.size == chunk.count and (most is None or chunk.size <= most) for chunk in chunks)


@given(count=st.integers(0, 30000), roi_bytes=st.sampled_from([1, 250_880, 501_760, 10**7, 2**40]))
def test_chunks_on_a_gpu_are_few_and_padded_by_less_than_an_eighth(count: int, roi_bytes: int) -> None:
    with torch.no_grad():
        chunks = roi_chunks.roi_chunks(count, GPU, roi_bytes)
    assert_complete(chunks, count)
    most = GPU_CHUNK_BYTES // roi_bytes
    assert max(chunk.size for chunk in chunks) <= max(most, MIN_SIZE)
    assert sum(chunk.size for chunk in chunks) - count < max(chunks[-1].count / 8, MIN_SIZE + 1)
    assert all(chunk.size == chunk.count for chunk in chunks[:-1])
    # the largest size is at least 8/9 of the limit
    assert len(chunks) <= max(-(-count // max(most * 8 // 9, MIN_SIZE)), 1)


def assert_complete(chunks: list[roi_chunks.Chunk], count: int) -> None:
    rows = [i for chunk in chunks for i in range(chunk.first, chunk.first + chunk.count)]
    assert chunks and rows == list(range(count))
    values = torch.arange(count * 2.0).reshape(count, 2)
    assert torch.cat([chunk.take(values)[: chunk.count] for chunk in chunks]).equal(values)
    assert all(len(chunk.take(values)) == chunk.size for chunk in chunks)


def test_chunk_sizes_on_a_gpu_are_eight_per_power_of_two() -> None:
    sizes = {padded_size(count) for count in range(5121)}
    assert len(sizes) == 59 and min(sizes) == MIN_SIZE and max(sizes) == 5120
    assert sizes == {padded_size(size) for size in sizes}
    assert len({padded_size(count) for count in range(800, 1601)}) == 9  # numbers of detections in 16 images
    with torch.no_grad():
        every = {c.size for count in range(0, 20001, 7) for c in roi_chunks.roi_chunks(count, GPU, 250_880)}
    assert every <= sizes


@pytest.mark.parametrize(("itemsize", "counts"), [
    (2, {320: 1, 1600: 1, 4800: 1, 9600: 2, 20000: 4}), (4, {320: 1, 1600: 1, 2400: 1, 4800: 2, 9600: 4}),
])  # fmt: skip
def test_number_of_chunks_for_the_proposals_of_a_batch(itemsize: int, counts: dict[int, int]) -> None:
    """For ResNet-101-C4, whose conv5 pools 2560 channels; 4800 are 16 images with 300 proposals.

    They are the outputs of its first two 1x1 convolutions (512 and 2048), which are computed on the map.
    """
    with torch.no_grad():
        found = {count: roi_chunks.roi_chunks(count, GPU, 2560 * 49 * itemsize) for count in counts}
    assert {count: len(chunks) for count, chunks in found.items()} == counts
    for count, chunks in found.items():
        assert chunks[0].size == padded_size(
            -(-count // len(chunks))
        )  # chunks have equal sizes, not the largest possible one


def test_with_gradients_all_rois_are_one_chunk() -> None:
    assert [chunk.size for chunk in roi_chunks.roi_chunks(777, GPU, 10**8, 5)] == [777]


@pytest.mark.parametrize("changes", [(), PYRAMID], ids=["c4", "fpn"])
def test_convolutions_of_many_images_have_few_shapes(monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]) -> None:
    model, random = small_model(*changes, "proposals.post_nms_top_n_test=60"), np.random.default_rng(0)
    images = [random.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(20)]
    options = DetectionOptions(score_threshold=0.2, max_regions=100)
    found, plans = [], []
    for padded in (False, True):
        if padded:
            pad_as_on_gpu(monkeypatch)
        with Shapes() as shapes:
            found.append([detect_batch(model, [i], records_of([i]), CATEGORY_IDS, options)[0] for i in images])
        plans.append(shapes.seen)
    numbers = {len(regions) for regions in found[0]}
    assert len(numbers) >= 8
    rows = [{images for _, (images, *_), *_ in seen} for seen in plans]
    assert numbers <= rows[0] and rows[1] <= {1, *map(padded_size, numbers | {60})}
    assert len(plans[1]) < len(plans[0]) - 2 * len(numbers)
    print(f"distinct convolutions of 20 images: {len(plans[0])}, in chunks {len(plans[1])}")
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.category_ids, other.category_ids)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_allclose(one.features["fc7"], other.features["fc7"], rtol=1e-4, atol=1e-4)
        assert one.masks == other.masks


@pytest.mark.parametrize("changes", HEADS, ids=["c4", "fpn", "convolutions", "single map", "vgg"])
@pytest.mark.parametrize("count", [0, 1, 32, 33, 200])
def test_features_do_not_depend_on_the_padding(
    monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...], count: int
) -> None:
    model, has_masks = small_model(*changes), changes != VGG
    corners, sides = np.random.default_rng(0).uniform(0, 60, (2, count, 2)).astype(np.float32)
    boxes, labels = np.hstack((corners, corners + sides + 4)), np.full(count, 2)
    image = np.zeros((96, 128, 3), np.uint8) + np.arange(128, dtype=np.uint8)[:, None]
    names = ("pool5", "fc7") if changes else ("pool5", "fc7", "spatial_fc7")
    expected = describe(model, image, boxes, labels if has_masks else None, names)
    for most in (None, 64):
        pad_as_on_gpu(monkeypatch, most)
        with Shapes() as shapes:
            found = describe(model, image, boxes, labels if has_masks else None, names)
        with torch.no_grad():
            sizes = {chunk.size for chunk in roi_chunks.roi_chunks(count, CPU, 1)}
        assert max(sizes) <= (most or 10**6) and {rows for _, (rows, *_), *_ in shapes.seen} <= {1, *sizes}
        assert found.masks == expected.masks
        for name in names:
            assert len(found.features[name]) == count
            np.testing.assert_allclose(found.features[name], expected.features[name], rtol=1e-4, atol=1e-4)


def describe(
    model: MaskRCNN, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray | None, names: tuple[str, ...]
) -> ImageFeatures:
    given = None if labels is None else [labels]
    return describe_boxes(model, [image], [boxes], features=names, labels=given)[0]


@pytest.mark.parametrize("changes", HEADS[1:4], ids=["fpn", "convolutions", "single map"])
def test_padding_pads_the_rois_rather_than_their_pooled_bins(
    monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    model, padded = small_model(*changes), []
    pad = roi_chunks.pad_rows

    def record_padding(values: torch.Tensor, size: int) -> torch.Tensor:
        padded.append(values[0].numel() if len(values) < size else 0)
        return pad(values, size)

    pad_as_on_gpu(monkeypatch)
    for module in (roi_chunks, roi_heads):
        monkeypatch.setattr(module, "pad_rows", record_padding)
    boxes = np.zeros((50, 4), np.float32) + np.float32([5, 5, 40, 40])
    describe(model, np.zeros((96, 128, 3), np.uint8), boxes, np.full(50, 2), ("fc7",))
    assert set(padded) - {0} == {1, 5}  # labels and RoIs
