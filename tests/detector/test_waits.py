"""A GPU is kept waiting as seldom for many images as for few, and what it finds is fetched once a batch.

Counted on the CPU, in the same code: which calls would be copies that wait, or wait for an answer.
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
from refdet.detector import predictor
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.postprocess import batched_nms, top_anchors
from refdet.detector.predictor import detect_batch, start_describing, start_detecting
from refdet.structures.box_convention import BoxConvention
from refdet.structures.detection_options import DetectionOptions

OPTIONS = DetectionOptions(score_threshold=0.05, max_regions=10)


def inputs_of(model: MaskRCNN, count: int) -> tuple[torch.Tensor, list[Any]]:
    """Of images that are all of one input size, every second of another original size."""
    (small,) = some_images(1)
    images = [small, small.repeat(2, axis=0).repeat(2, axis=1)] * (count // 2)
    sizes = [input_size(*image.shape[:2], model.recipe.input) for image in images]
    return network_inputs(images, sizes, model.recipe.input).contiguous(memory_format=torch.channels_last), sizes


@pytest.mark.parametrize("lower_threshold_if_empty", [False, True])
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        # the numbers of proposals, of candidates and of detections; the end of the batch is awaited in another thread
        pytest.param((), 3, id="c4"),
        pytest.param(("model.legacy_plus_one=true", "model.pooling=crop_and_resize"), 3, id="crop"),
        # and the numbers of RoIs of each level, of proposals and of detections
        pytest.param(PYRAMID, 5, id="fpn"),
    ],
)
@torch.inference_mode()
def test_detection_waits_no_oftener_for_more_images(
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
    assert operators_of_many == operators  # each does the work of all images


@torch.inference_mode()
def test_describing_waits_no_oftener_for_more_images() -> None:
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
def test_each_tensor_of_a_batch_is_fetched_once() -> None:
    model, counts = small_model(), []
    for count in (2, 8):
        images = some_images(count)
        with counted() as (python, _):
            finish = start_detecting(model, images, records_of(images), CATEGORY_IDS, OPTIONS)
        assert len(finish()) == count
        counts.append(python.fetched)
    assert counts == [7, 7]  # boxes, scores, labels, masks, pool5, fc7, whether all is finite


@torch.inference_mode()
def test_the_map_is_kept_only_where_it_is_asked_for() -> None:
    model = small_model()
    images, sizes = inputs_of(model, 2)
    boxes = [torch.tensor([[8.0, 8, 48, 40]])] * 2
    assert model.predict(images, sizes, OPTIONS).feature_map is None
    assert model.extract_features(images, sizes, boxes).feature_map is None
    feature_map = model.extract_features(images, sizes, boxes, features=("pool5", "head")).feature_map
    assert feature_map is not None and torch.equal(feature_map, model.extract_feature_maps(images)[0])


@pytest.mark.parametrize("describing", [False, True])
def test_masks_are_made_and_results_awaited_when_a_batch_is_finished(
    monkeypatch: pytest.MonkeyPatch, describing: bool
) -> None:
    """So that the thread that computes may go on with the next batch."""
    steps: list[str] = []
    end, encode = predictor._make_wait, predictor.paste_masks

    def watched_end(*given: Any) -> Callable[[], None]:
        wait = end(*given)
        return lambda: (steps.append("wait"), wait())[1]

    def watched_masks(*given: Any) -> list[bytes]:
        steps.append("masks")
        return encode(*given)

    monkeypatch.setattr(predictor, "_make_wait", watched_end)
    monkeypatch.setattr(predictor, "paste_masks", watched_masks)
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


def test_waiting_for_a_gpu_takes_no_core_from_those_that_read_images(monkeypatch: pytest.MonkeyPatch) -> None:
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
    for found, wanted in zip(finish(), expected, strict=True):
        np.testing.assert_array_equal(found.boxes, wanted.boxes)


@pytest.mark.parametrize("inclusive", [False, True])
def test_scales_of_many_images_are_those_of_each(inclusive: bool) -> None:
    convention = BoxConvention(inclusive)
    boxes = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) * 300
    pairs = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    for change in (convention.scale, convention.unscale):
        alone = [change(box[None], (x, y)) for box, (x, y) in zip(boxes, pairs.tolist(), strict=True)]
        assert torch.equal(change(boxes, pairs), torch.cat(alone))


def test_the_best_anchors_come_by_index_where_they_are_equal() -> None:
    logits = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[0, 5], logits[0, 9], logits[2] = -0.0, 0.0, -1.5
    scores, places = top_anchors(logits, 6000, legacy_tie_order=False)
    wanted = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores, wanted.values[:, :6000]) and torch.equal(places, wanted.indices[:, :6000])
    assert (logits.topk(6000, dim=1).indices != places).any()  # which is why it is not `topk` of the logits
    for batch in (logits[:1], logits[1:]):
        assert torch.equal(top_anchors(batch, 50, False)[1], places[[0] if len(batch) == 1 else [1, 2], :50])


def test_the_seeds_ranking_is_one_sort_where_its_order_cannot_be_had() -> None:
    """On another device than the CPU; here on one that computes shapes alone."""
    with InAten() as aten:
        scores, places = top_anchors(torch.empty(4, 500, device="meta"), 20, legacy_tie_order=True)
    assert scores.shape == places.shape == (4, 20) and aten.calls["sort"] == 1


def test_the_seeds_nms_is_one_call_where_its_order_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    from refdet.detector import postprocess

    calls = []

    def called(*given: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((given, more))
        return torch.tensor([[4, 0, -1], [7, -1, -1]]), torch.tensor([2, 1])

    monkeypatch.setattr(postprocess, "nms_padded", called)
    boxes, scores, ids = torch.empty(9, 4, device="meta"), torch.empty(9, device="meta"), torch.empty(9, device="meta")
    with InAten() as aten:
        kept, counts = batched_nms(boxes, scores, ids, ids, 2, 0.3, 3, legacy_tie_order=True)
    assert len(calls) == 1 and calls[0][0][0] is boxes and aten.calls["sort"] == 0
    assert kept.tolist() == [4, 0, 7] and counts == [2, 1]


def test_detections_of_a_batch_are_each_images_own() -> None:
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
