"""Detection synchronizes with a GPU as often for many images as for few, and fetches its results once per batch.

The calls that would synchronize are counted on the CPU (see helpers/host_waits.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from detector_examples import CATEGORY_IDS, PYRAMID, records_of, small_model, some_images
from host_waits import GIVEN, InAten, answers, counted, waits

from refdet.data.transforms import input_size, network_inputs
from refdet.detector import postprocess, predictor
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.postprocess import batched_nms, top_anchors
from refdet.detector.predictor import detect_batch, start_describing, start_detecting
from refdet.structures.box_convention import BoxConvention
from refdet.structures.detection_options import DetectionOptions

OPTIONS = DetectionOptions(score_threshold=0.05, max_regions=10)


def inputs_of(model: MaskRCNN, count: int) -> tuple[torch.Tensor, list[Any]]:
    """Network inputs of equal size, from images of two different sizes in turn."""
    (small,) = some_images(1)
    images = [small, small.repeat(2, axis=0).repeat(2, axis=1)] * (count // 2)
    sizes = [input_size(*image.shape[:2], model.recipe.input) for image in images]
    return network_inputs(images, sizes, model.recipe.input).contiguous(memory_format=torch.channels_last), sizes


@pytest.mark.parametrize("lower_threshold_if_empty", [False, True])
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        # for the numbers of proposals, candidates and detections; another thread waits for the end of the batch
        pytest.param((), 3, id="c4"),
        pytest.param(("model.legacy_plus_one=true", "model.pooling=crop_and_resize"), 3, id="crop"),
        # also for the numbers of RoIs per level, of proposals and of detections
        pytest.param(PYRAMID, 5, id="fpn"),
    ],
)
@torch.inference_mode()
def test_detection_synchronizes_no_more_often_for_more_images(
    changes: Sequence[str], wanted: int, lower_threshold_if_empty: bool
) -> None:
    model, found = small_model(*changes), []
    options = replace(OPTIONS, lower_threshold_if_empty=lower_threshold_if_empty)
    for count in (2, 8):
        images, sizes = inputs_of(model, count)
        with counted() as (python, aten):
            model.predict(images, sizes, options)
        found.append((waits(python, aten), sum(aten.calls.values())))
    (few, operators), (many, operators_of_many) = found
    assert few == many and answers(few) == wanted
    assert operators_of_many == operators  # each operator works on all images


@torch.inference_mode()
def test_describing_synchronizes_no_more_often_for_more_images() -> None:
    model, found = small_model(), []
    for count in (2, 8):
        images, sizes = inputs_of(model, count)
        boxes, labels = [torch.tensor([[8.0, 8, 48, 40], [1, 1, 60, 60]])] * count, [torch.tensor([1, 3])] * count
        with counted() as (python, aten):
            model.extract_features(images, sizes, boxes, labels)
        found.append((waits(python, aten), sum(aten.calls.values())))
    assert found[0] == found[1]
    assert set(found[0][0]) == GIVEN


@torch.inference_mode()
def test_each_result_of_a_batch_is_fetched_once() -> None:
    model, counts = small_model(), []
    for count in (2, 8):
        images = some_images(count)
        with counted() as (python, _):
            finish = start_detecting(model, images, records_of(images), CATEGORY_IDS, OPTIONS)
        assert len(finish()) == count
        counts.append(python.fetched)
    assert counts == [7, 7]  # boxes, scores, labels, masks, pool5, fc7, whether all is finite


@torch.inference_mode()
def test_the_feature_map_is_kept_only_if_requested() -> None:
    model = small_model()
    images, sizes = inputs_of(model, 2)
    boxes = [torch.tensor([[8.0, 8, 48, 40]])] * 2
    assert model.predict(images, sizes, OPTIONS).feature_map is None
    assert model.extract_features(images, sizes, boxes).feature_map is None
    feature_map = model.extract_features(images, sizes, boxes, features=("pool5", "head")).feature_map
    assert feature_map is not None and torch.equal(feature_map, model.extract_feature_maps(images)[0])


@pytest.mark.parametrize("describing", [False, True])
def test_masks_are_pasted_only_after_waiting_for_the_batch(monkeypatch: pytest.MonkeyPatch, describing: bool) -> None:
    """Both happen when the batch is finished, so that the computing thread can start the next batch before."""
    steps: list[str] = []
    make_wait, encode = predictor._make_wait, predictor.paste_masks

    def record_wait(*given: Any) -> Callable[[], None]:
        wait = make_wait(*given)

        def record_and_wait() -> None:
            steps.append("wait")
            wait()

        return record_and_wait

    def record_masks(*given: Any) -> list[bytes]:
        steps.append("masks")
        return encode(*given)

    monkeypatch.setattr(predictor, "_make_wait", record_wait)
    monkeypatch.setattr(predictor, "paste_masks", record_masks)
    model, images = small_model(), some_images(2)
    finish: Callable[[], list[Any]]
    if describing:
        boxes, labels = [np.array([[8, 8, 48, 40]], np.float32)] * 2, [np.array([1])] * 2
        finish = start_describing(model, images, boxes, features=("pool5",), labels=labels)
    else:
        finish = start_detecting(model, images, records_of(images), CATEGORY_IDS, OPTIONS)
    assert steps == []
    assert all(one.masks for one in finish())
    assert steps == ["wait", "masks", "masks"]


def test_waiting_for_a_gpu_uses_a_blocking_event(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            calls.append(blocking)

        def record(self, stream: object) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    wait = predictor._make_wait(torch.device("cuda"))
    assert calls == [True, "the stream"]
    wait()
    assert calls[2:] == ["waited"]


def test_images_may_change_once_detection_has_started() -> None:
    model, image = small_model(), np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    images = [image.copy(), image.copy()]
    options = DetectionOptions(score_threshold=0.0, max_regions=5)
    expected = predictor.detect_batch(model, images, records_of(images), CATEGORY_IDS, options)
    finish = predictor.start_detecting(model, images, records_of(images), CATEGORY_IDS, options)
    for one in images:
        one[:] = 0
    for regions, unchanged in zip(finish(), expected, strict=True):
        np.testing.assert_array_equal(regions.boxes, unchanged.boxes)


@pytest.mark.parametrize("inclusive", [False, True])
def test_scaling_boxes_of_many_images_equals_scaling_each(inclusive: bool) -> None:
    convention = BoxConvention(inclusive)
    boxes = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) * 300
    pairs = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    for change in (convention.scale, convention.unscale):
        alone = [change(box[None], (x, y)) for box, (x, y) in zip(boxes, pairs.tolist(), strict=True)]
        assert torch.equal(change(boxes, pairs), torch.cat(alone))


def test_top_anchors_with_equal_scores_are_ordered_by_index() -> None:
    logits = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[0, 5], logits[0, 9], logits[2] = -0.0, 0.0, -1.5
    scores, places = top_anchors(logits, 6000, legacy_tie_order=False)
    wanted = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores, wanted.values[:, :6000]) and torch.equal(places, wanted.indices[:, :6000])
    assert (logits.topk(6000, dim=1).indices != places).any()  # `topk` does not keep this order
    for batch in (logits[:1], logits[1:]):
        assert torch.equal(top_anchors(batch, 50, False)[1], places[[0] if len(batch) == 1 else [1, 2], :50])


def test_the_legacy_order_of_anchors_is_a_single_sort_on_a_gpu() -> None:
    """The reference's order of equal scores exists only on the CPU; the meta device stands for a GPU."""
    with InAten() as aten:
        scores, places = top_anchors(torch.empty(4, 500, device="meta"), 20, legacy_tie_order=True)
    assert scores.shape == places.shape == (4, 20) and aten.calls["sort"] == 1


def test_nms_with_the_legacy_order_is_a_single_call_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record_call(*given: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((given, more))
        return torch.tensor([[4, 0, -1], [7, -1, -1]]), torch.tensor([2, 1])

    monkeypatch.setattr(postprocess, "nms_padded", record_call)
    boxes, scores, ids = torch.empty(9, 4, device="meta"), torch.empty(9, device="meta"), torch.empty(9, device="meta")
    with InAten() as aten:
        kept, counts = batched_nms(boxes, scores, ids, ids, 2, 0.3, 3, legacy_tie_order=True)
    assert len(calls) == 1 and calls[0][0][0] is boxes and aten.calls["sort"] == 0
    assert kept.tolist() == [4, 0, 7] and counts == [2, 1]


def test_detections_in_a_batch_equal_those_of_single_images() -> None:
    model, images = small_model(), some_images(3)
    names = ("pool5", "fc7", "head")
    options = DetectionOptions(score_threshold=0.05, max_regions=10)
    for found, image, record in zip(
        detect_batch(model, images, records_of(images), CATEGORY_IDS, options, features=names),
        images,
        records_of(images),
        strict=True,
    ):
        (alone,) = detect_batch(model, [image], [record], CATEGORY_IDS, options, features=names)
        np.testing.assert_allclose(found.maps["head"], alone.maps["head"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(found.features["fc7"], alone.features["fc7"], rtol=1e-3, atol=1e-3)
        assert found.masks == alone.masks
