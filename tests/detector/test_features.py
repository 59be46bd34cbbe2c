"""The features of detections and of given boxes."""

from functools import partial

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align
from trained_models import IDS, PYRAMID, SMALL, some_images, trained_model

from refdet.config import recipe as recipes
from refdet.data.transforms import input_size, network_input
from refdet.detector import optimize
from refdet.detector.feature_names import FEATURE_MAP, SPATIAL_FEATURES, VECTOR_FEATURES, check_features
from refdet.detector.predictor import describe_boxes, detect_batch, start_describing, start_detecting
from refdet.errors import InputError, RuntimeFailure
from refdet.structures.detection_options import DetectionOptions

FEATURES = (*VECTOR_FEATURES, *SPATIAL_FEATURES, FEATURE_MAP)
# of each of `some_images`
BOXES = [np.array([[1, 1, 60, 60], [20, 10, 120, 90]], np.float32), np.zeros((0, 4), np.float32)]


@pytest.mark.parametrize("optimized", [False, True])
@torch.inference_mode()
def test_features_of_given_boxes_equal_their_definitions(optimized: bool) -> None:
    model = optimize.optimize_for_inference(trained_model()) if optimized else trained_model()
    images, _ = some_images()
    first, empty = describe_boxes(model, images, BOXES, features=FEATURES)
    size = input_size(96, 128, model.recipe.input)  # not resized, so boxes are in pixels of the input
    inputs = network_input(images[0], size, model.recipe.input)[None]
    (conv4,) = model.extract_feature_maps(inputs.contiguous(memory_format=torch.channels_last))
    np.testing.assert_allclose(first.maps["head"], conv4[0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(first.im_info, np.array([96, 128, 1], np.float32))  # height, width, scale
    cells = roi_align(conv4, [torch.from_numpy(BOXES[0])], 7, 1 / 16, sampling_ratio=2, aligned=True).numpy()
    found = first.features
    np.testing.assert_allclose(found["spatial_pool5"], cells, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["pool5"], cells.mean((2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["fc7"], found["spatial_fc7"].mean((2, 3)), rtol=1e-4, atol=1e-5)
    logits = found["fc7"] @ model.head.box.score.weight.numpy().T + model.head.box.score.bias.numpy()
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found["class_prob"], expected, rtol=1e-4, atol=1e-6)
    assert {name: values.shape for name, values in empty.features.items()} == {
        name: (0, *found[name].shape[1:]) for name in found
    }
    assert found["spatial_fc7"].shape == (2, 256, 7, 7) and found["class_prob"].shape == (2, 5)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_refused_if_it_has_nan(name: str) -> None:
    model = trained_model()
    # No other feature depends on the class scores, so their weights make only class_prob NaN.
    weight = model.head.box.score.weight if name == "class_prob" else model.backbone.conv1.weight
    with torch.no_grad():
        weight.fill_(torch.nan)
    images, _ = some_images()
    with pytest.raises(RuntimeFailure, match="contain NaN or inf"):
        describe_boxes(model, images, BOXES, features=[name])


def test_detections_have_the_features_of_their_boxes() -> None:
    model = optimize.optimize_for_inference(trained_model())
    images, records = some_images()
    names = VECTOR_FEATURES + SPATIAL_FEATURES
    regions = detect_batch(
        model, images, records, IDS, DetectionOptions(score_threshold=0.1, max_regions=10), features=names
    )
    described = describe_boxes(model, images, [r.boxes for r in regions], features=names)
    for found, wanted in zip(regions, described, strict=True):
        assert list(found.features) == list(names) and len(found) > 3
        for name in names:
            np.testing.assert_allclose(found.features[name], wanted.features[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_float16_features_equal_converted_float32_features(bf16: bool) -> None:
    """Features are converted to float16 before the copy from the GPU; converting the copy gives the same bits."""
    model = optimize.optimize_for_inference(trained_model().to(torch.bfloat16 if bf16 else torch.float32))
    images, records = some_images()
    options = DetectionOptions(score_threshold=0.1, max_regions=10)
    detect = partial(start_detecting, model, images, records, IDS, options, features=FEATURES)
    describe = partial(start_describing, model, images, BOXES, features=FEATURES)
    for start in (detect, describe):
        for exact, half in zip(start()(), start(dtype=torch.float16)(), strict=True):
            wanted, found = {**exact.features, **exact.maps}, {**half.features, **half.maps}
            assert list(found) == list(wanted) == list(FEATURES)
            for name, values in found.items():
                assert (values.dtype, wanted[name].dtype) == (np.float16, np.float32)
                np.testing.assert_array_equal(values, wanted[name].astype(np.float16))


def test_batches_may_be_finished_in_any_order() -> None:
    model = optimize.optimize_for_inference(trained_model())
    images, records = some_images()
    options = DetectionOptions(score_threshold=0.1)
    wanted = [detect_batch(model, [i], [r], IDS, options)[0] for i, r in zip(images, records, strict=True)]
    # functions that finish a batch of one image each
    started = [start_detecting(model, [i], [r], IDS, options) for i, r in zip(images, records, strict=True)]
    for finish, expected in reversed(list(zip(started, wanted, strict=True))):
        (found,) = finish()
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        np.testing.assert_array_equal(found.features["fc7"], expected.features["fc7"])
        assert found.masks == expected.masks


def test_a_pyramid_has_only_vector_features() -> None:
    c4, pyramid = (recipes.load("demo").with_changes([*SMALL, *more]) for more in ([], PYRAMID))
    check_features(FEATURES, c4)
    check_features(VECTOR_FEATURES, pyramid)
    for name in (*SPATIAL_FEATURES, FEATURE_MAP):
        with pytest.raises(InputError, match=f"^features: .* has no '{name}', .*C4"):
            check_features(["pool5", name], pyramid)
    with pytest.raises(InputError, match="^features: unknown feature 'fc8'; choose from pool5, "):
        check_features(["fc8"], c4)
