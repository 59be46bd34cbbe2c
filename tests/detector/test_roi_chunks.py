"""RoIs go through convolutions in chunks of few sizes on a GPU, whose results are those of all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detector_examples import CATEGORY_IDS, PYRAMID, records_of, small_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from refdet.detector import roi_chunks
from refdet.detector.predictor import describe_boxes, detect_batch
from refdet.detector.roi_chunks import SIZES
from refdet.structures.detection_options import DetectionOptions

HEADS = [(), PYRAMID, (*PYRAMID, "model.box_convs=2")]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Shapes(TorchDispatchMode):
    """Distinct inputs and weights of convolutions, each of which is a plan of cuDNN."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "conv" in func.overloadpacket.__name__:
            self.seen.add((func.overloadpacket.__name__, *(tuple(t.shape) for t in args[:2])))
        return func(*args, **(kwargs or {}))


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roi_chunks.SIZES, "cpu", SIZES["cuda"])


@given(count=st.integers(0, 3000), most=st.sampled_from([None, 1, 7, 83]), device=st.sampled_from([CPU, GPU]))
def test_chunks_have_each_roi_once(count: int, most: int | None, device: torch.device) -> None:
    with torch.no_grad():
        chunks = roi_chunks.roi_chunks(count, device, most)
    assert [i for chunk in chunks for i in range(chunk.first, chunk.first + chunk.count)] == list(
        range(count)
    ) and chunks
    if device is GPU:
        assert {chunk.size for chunk in chunks} <= set(SIZES["cuda"])
        assert sum(chunk.size for chunk in chunks) - count <= SIZES["cuda"][-1] - (count > 0)
    else:
        assert all(chunk.size == chunk.count and (most is None or chunk.size <= most) for chunk in chunks)
    values = torch.arange(count * 2.0).reshape(count, 2)
    assert torch.cat([chunk.take(values)[: chunk.count] for chunk in chunks]).equal(values)
    assert all(len(chunk.take(values)) == chunk.size for chunk in chunks)


def test_with_gradients_all_rois_are_one_chunk() -> None:
    assert [chunk.size for chunk in roi_chunks.roi_chunks(777, GPU, 5)] == [777]


@pytest.mark.parametrize("changes", [(), PYRAMID], ids=["c4", "fpn"])
def test_convolutions_of_twenty_images_have_few_shapes(
    monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    model, random = small_model(*changes, "proposals.post_nms_top_n_test=60"), np.random.default_rng(0)
    images = [random.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(20)]
    options = DetectionOptions(score_threshold=0.2, max_regions=100)
    found, plans = [], []
    for padded in (False, True):
        if padded:
            on_gpu(monkeypatch)
        with Shapes() as shapes:
            found.append([detect_batch(model, [i], records_of([i]), CATEGORY_IDS, options)[0] for i in images])
        plans.append(shapes.seen)
    numbers = {len(regions) for regions in found[0]}
    assert len(numbers) >= 8
    rows = [{images for _, (images, *_), *_ in seen} for seen in plans]
    assert numbers <= rows[0] and rows[1] <= {1, *SIZES["cuda"]}
    assert len(plans[1]) < len(plans[0]) - 2 * len(numbers)
    print(f"distinct convolutions of 20 images: {len(plans[0])}, in chunks {len(plans[1])}")
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.category_ids, other.category_ids)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_allclose(one.features["fc7"], other.features["fc7"], rtol=1e-4, atol=1e-4)
        assert one.masks == other.masks


@pytest.mark.parametrize("changes", HEADS, ids=["c4", "fpn", "convolutions"])
@pytest.mark.parametrize("count", [0, 1, 32, 33, 200])
def test_features_do_not_depend_on_the_padding(
    monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...], count: int
) -> None:
    model = small_model(*changes)
    corners = np.random.default_rng(0).uniform(0, 90, (count, 2)).astype(np.float32)
    boxes, labels = np.hstack((corners, corners + 20)), np.full(count, 2)
    image = np.zeros((96, 128, 3), np.uint8) + np.arange(128, dtype=np.uint8)[:, None]
    names = ("pool5", "fc7") if changes else ("pool5", "fc7", "spatial_fc7")
    (wanted,) = describe_boxes(model, [image], [boxes], features=names, labels=[labels])
    on_gpu(monkeypatch)
    with Shapes() as shapes:
        (found,) = describe_boxes(model, [image], [boxes], features=names, labels=[labels])
    assert {rows for _, (rows, *_), *_ in shapes.seen} <= {1, *SIZES["cuda"]}
    assert found.masks == wanted.masks
    for name in names:
        assert len(found.features[name]) == count
        np.testing.assert_allclose(found.features[name], wanted.features[name], rtol=1e-4, atol=1e-4)
