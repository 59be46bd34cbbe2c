"""Large-scale jitter: pixels, boxes and masks of a crop equal those of the whole resized image, shifted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from training_examples import run, squares, tiny

from refdet.config.recipe import InputOptions
from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.scale_jitter import crop_boxes, sample_jittered_size, visible_window
from refdet.data.training_batches import Batch, TrainingBatches, image_bytes, max_image_bytes
from refdet.data.transforms import network_input
from refdet.detector.checkpoint import read_tensors
from refdet.detector.target_assignment import compute_mask_targets
from refdet.structures.box_convention import InputSize
from refdet.structures.ground_truth import GroundTruth

OPTIONS = InputOptions(crop_size=64, scale_range=(0.1, 2.0), size_divisibility=1)
CPU = torch.device("cpu")
sides, seeds = st.integers(1, 150), st.integers(0, 2**32 - 1)


def sample_size(height: int, width: int, seed: int, options: InputOptions = OPTIONS) -> InputSize:
    return sample_jittered_size(height, width, options, np.random.default_rng(seed))


@settings(max_examples=150, deadline=None)
@given(height=sides, width=sides, seed=seeds)
def test_the_input_is_a_crop_of_an_image_resized_to_the_scaled_square(height: int, width: int, seed: int) -> None:
    size = sample_size(height, width, seed)
    whole = size.resized_size
    assert 0.1 * 64 - 1 <= max(whole) <= 2 * 64 + 1
    assert (size.height, size.width) == (min(whole[0], 64), min(whole[1], 64))
    x, y = size.crop_origin
    assert 0 <= x <= whole[1] - size.width and 0 <= y <= whole[0] - size.height
    assert size.scale == (whole[1] / width, whole[0] / height)
    for flip in (False, True):
        left, top, right, bottom = visible_window(size, flip)
        assert -1e-6 <= left < right <= width + 1e-6 and -1e-6 <= top < bottom <= height + 1e-6
        assert right - left == pytest.approx(size.width / size.scale_x)


def test_scales_and_crop_origins_are_uniform() -> None:
    random = np.random.default_rng(0)
    found = [sample_jittered_size(640, 640, replace(OPTIONS, crop_size=1000), random) for _ in range(4000)]
    scales = np.array([size.resized_size[0] / 1000 for size in found])
    assert abs(scales.mean() - 1.05) < 0.03 and scales.min() < 0.11 and scales.max() > 1.99
    relative_origins = np.array(
        [size.crop_origin[0] / (size.resized_size[1] - size.width) for size in found if size.resized_size[1] > 1200]
    )
    assert abs(relative_origins.mean() - 0.5) < 0.03 and relative_origins.min() < 0.01 and relative_origins.max() > 0.99


def batch(root: Path, *changes: str, step: int = 0) -> Batch:
    recipe = tiny("input.crop_size=64", "train.batch_size=4", *changes)
    found = TrainingBatches(CocoIndex.load(root / "instances.json"), ImageSource.open(root / "images"), recipe)[step]
    assert isinstance(found, Batch)
    return found


@pytest.fixture(scope="module")
def noise_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noisy")
    squares(root)
    random = np.random.default_rng(0)
    for path in (root / "images").iterdir():
        Image.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize("resize", ["antialias", "opencv", "pillow", "torchvision"])
def test_pixels_of_a_crop_equal_the_whole_resized_image(noise_dataset: Path, resize: str) -> None:
    options, kinds = tiny("input.crop_size=64", f"input.resize={resize}").input, set()
    for step in range(6):
        found = batch(noise_dataset, f"input.resize={resize}", step=step)
        inputs = found.inputs(options, CPU)
        assert inputs.shape == (4, 3, 64, 64)
        for row, (size, flip, id_) in enumerate(zip(found.sizes, found.flips, found.image_ids, strict=True)):
            with Image.open(noise_dataset / "images" / f"{id_}.png") as image:
                pixels = np.array(image)
            height, width = size.resized_size
            everything = replace(size, height=height, width=width, cropped_from=None, crop_origin=(0, 0))
            whole = network_input(pixels[:, ::-1] if flip else pixels, everything, options)
            seen = inputs[row, :, : size.height, : size.width]
            torch.testing.assert_close(seen, whole[(slice(None), *size.crop)], atol=1e-5, rtol=1e-5)
            assert not inputs[row, :, size.height :].any() and not inputs[row, :, :, size.width :].any()
            kinds.add((flip, max(size.resized_size) > 64, found.images.layouts[row][0]))
            assert image_bytes(size, options) <= max_image_bytes(64, 96, options)
    assert {kind[:2] for kind in kinds} == {(a, b) for a in (False, True) for b in (False, True)}


@pytest.mark.parametrize("scales", ["[1, 1.5]", "[0.4, 0.9]"])
def test_boxes_of_a_crop_fit_the_visible_objects(tmp_path: Path, scales: str) -> None:
    squares(tmp_path)
    for path in (tmp_path / "images").iterdir():
        picture = Image.new("RGB", (96, 64))
        ImageDraw.Draw(picture).rectangle((8, 8, 37, 37), (255, 0, 0))
        ImageDraw.Draw(picture).rectangle((50, 20, 79, 49), (0, 0, 255))
        picture.save(path)
    options, compared = tiny().input, 0
    mean, std = (torch.tensor(values)[:, None, None] for values in (options.mean, options.std))
    for step in range(8):
        found = batch(tmp_path, f"input.scale_range={scales}", step=step)
        for image, target, (height, width) in zip(
            found.inputs(options, CPU), found.targets, found.input_sizes, strict=True
        ):
            colors = (image * std + mean)[:, :height, :width]
            for box, label in zip(target.boxes, target.labels.tolist(), strict=True):
                y, x = (colors[0 if label == 1 else 2] > 127).nonzero().unbind(1)
                if len(x):  # skip objects of which less than half a pixel is visible
                    seen = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1))
                    assert (seen - box).abs().max() <= 1
                    compared += 1
    assert compared > 20


@settings(max_examples=150, deadline=None)
@given(seed=seeds, flip=st.booleans(), convex=st.booleans())
def test_boxes_of_cropped_objects_enclose_their_visible_mask(seed: int, flip: bool, convex: bool) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(4, 40, 2))
    y1, x1 = (int(random.integers(0, side - 1)) for side in (height, width))
    y2, x2 = int(random.integers(y1 + 1, height + 1)), int(random.integers(x1 + 1, width + 1))
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1 if convex else random.integers(0, 2, (y2 - y1, x2 - x1))
    if not mask.any():
        return
    ys, xs = mask.nonzero()
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    size = sample_size(height, width, seed)
    window = visible_window(size, flip)
    kept, boxes = crop_boxes(torch.tensor([box], dtype=torch.float32), [coco_mask.encode(mask)], window)
    spans = [(max(x, window[0]), max(y, window[1]), min(x + 1, window[2]), min(y + 1, window[3]))
             for y, x in zip(ys, xs, strict=True)]  # fmt: skip
    seen = np.array([span for span in spans if span[0] < span[2] and span[1] < span[3]])
    if not len(seen):
        assert kept == [] and len(boxes) == 0
        return
    expected = np.concatenate((seen[:, :2].min(axis=0), seen[:, 2:].max(axis=0)))
    if min(expected[2:] - expected[:2]) > 0.02:
        assert kept == [0]
        np.testing.assert_allclose(boxes[0], expected, atol=1e-4)


def test_boxes_without_masks_are_clipped_or_dropped() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 8, 8], [11, 11, 12, 12], [5, 5, 5, 9]])
    kept, found = crop_boxes(boxes, [None] * 4, (3.0, 3.0, 10.0, 10.0))
    assert kept == [0, 1, 3] and found.tolist() == [[3, 3, 4, 4], [3, 3, 8, 8], [5, 5, 5, 9]]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, flip=st.booleans())
def test_mask_targets_equal_the_mask_area_in_each_cell(seed: int, flip: bool) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(20, 80, 2))
    small = random.integers(0, 2, (5, 4))
    mask = np.array(Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))
    size = sample_size(height, width, seed)
    corners = np.sort(random.uniform(0, 1, (6, 2, 2)), axis=1) * [size.width, size.height]
    rois = torch.tensor(corners.reshape(6, 4), dtype=torch.float32)
    truth = GroundTruth(rois[:1], torch.ones(1, dtype=torch.int64), [coco_mask.encode(np.asfortranarray(mask))],
                        rois[:0], size.scale, width if flip else None, size.crop_origin)  # fmt: skip
    found = compute_mask_targets(rois, torch.zeros(6, dtype=torch.int64), truth, 4)
    shown = mask[:, ::-1] if flip else mask
    steps = (np.arange(4 * 40) + 0.5) / (4 * 40)  # 40 samples along the side of a cell
    for roi, target in zip(rois.double().numpy(), found.numpy(), strict=True):
        xs, ys = ((low + (high - low) * steps + origin) / scale for low, high, origin, scale in
                  zip(roi[:2], roi[2:], size.crop_origin, size.scale, strict=True))  # fmt: skip
        sampled = shown[np.minimum(ys.astype(int), height - 1)][:, np.minimum(xs.astype(int), width - 1)]
        covered = sampled.reshape(4, 40, 4, 40).mean(axis=(1, 3))
        clear = abs(covered - 0.5) > 0.06
        np.testing.assert_array_equal(target[clear], covered[clear] >= 0.5)


def test_jitter_depends_only_on_seed_step_and_image(noise_dataset: Path) -> None:
    def sizes(*changes: str, step: int = 0) -> dict[int, InputSize]:
        found = batch(noise_dataset, *changes, step=step)
        return dict(zip(found.image_ids, found.sizes, strict=True))

    first = sizes()
    assert sizes() == first and len(set(first.values())) == 4
    for other in (sizes(step=1), sizes("train.seed=1")):
        assert all(other[id_] != size for id_, size in first.items())
    smaller = batch(noise_dataset, "train.batch_size=2")  # the same image in the same step of another batch
    for id_, size in zip(smaller.image_ids, smaller.sizes, strict=True):
        assert first[id_] == size


@pytest.mark.parametrize("legacy", [False, True])
def test_boxes_masks_and_crowds_of_a_batch_are_inside_the_crop(tmp_path: Path, legacy: bool) -> None:
    root = tmp_path / "crowds"
    squares(root, lambda tree: tree["annotations"][1].update(iscrowd=1))
    seen, objects = 0, 0
    for step in range(12):
        found = batch(root, f"model.legacy_plus_one={str(legacy).lower()}", step=step)
        for target, (height, width) in zip(found.targets, found.input_sizes, strict=True):
            assert target.masks is not None and len(target.masks) == len(target.boxes) == len(target.labels)
            for boxes in (target.boxes, target.crowds):
                assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
                assert (boxes[:, :2] < boxes[:, 2:]).all()
            objects += len(target.boxes)
            seen += len(target.crowds)
    assert seen and 0 < objects < 12 * 4 * 2  # some are cropped away


@pytest.mark.slow
def test_a_training_with_crops_resumes_to_the_same_weights(tmp_path: Path) -> None:
    squares(tmp_path)
    jitter = ["input.crop_size=64", "input.scale_range=[0.5, 2]", "train.steps=4"]
    run(tmp_path, *jitter, out="whole")
    run(tmp_path, *jitter, "train.steps=2", out="halves")
    run(tmp_path, *jitter, "train.workers=1", out="halves", resume=True)
    weights = [read_tensors(tmp_path / out / "model.safetensors")[0] for out in ("whole", "halves")]
    recipe = json.loads((tmp_path / "whole/model.json").read_text())["recipe"]
    assert recipe["input"]["crop_size"] == 64 and recipe["input"]["scale_range"] == [0.5, 2]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
