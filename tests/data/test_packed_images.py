"""Images on their way from a data loading worker to the device, where they become the network's input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_examples import squares, tiny

from refdet.config.recipe import InputOptions
from refdet.data import training_batches
from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.packed_images import PackedImages
from refdet.data.training_batches import Batch, input_is_smaller, padded_shape
from refdet.data.transforms import input_size, network_input

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.booleans()), min_size=1, max_size=6))
def test_packing_and_unpacking_preserves_images(shapes: list[tuple[list[int], bool]]) -> None:
    random = np.random.default_rng(0)
    images = [
        random.normal(size=shape).astype(np.float32) if floats else random.integers(0, 256, shape, dtype=np.uint8)
        for shape, floats in shapes
    ]
    packed = PackedImages.from_images(images)
    assert packed.data.dtype == torch.uint8 and packed.data.dim() == 1
    assert packed.data.numel() <= sum(image.nbytes + 3 for image in images)
    for image, found in zip(images, packed.unpack(CPU), strict=True):
        assert torch.equal(found, torch.from_numpy(image))


def inputs_one_by_one(images: list[np.ndarray], sizes: list, flips: list[bool], options: InputOptions) -> torch.Tensor:
    """Resize and normalize each image alone, then zero-pad."""
    inputs = [
        network_input(image[:, ::-1] if flip else image, size, options)
        for image, size, flip in zip(images, sizes, flips, strict=True)
    ]
    height, width = padded_shape(sizes, options.size_divisibility)
    padded = torch.zeros(len(inputs), 3, height, width)
    for row, image in zip(padded, inputs, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return padded


@pytest.mark.parametrize("divisor", [1, 32])
@pytest.mark.parametrize("resize", ["antialias", "opencv"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_batched_inputs_are_bitwise_equal_to_single_inputs(
    divisor: int, resize: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = InputOptions(min_sizes=(70,), max_size=120, resize=resize, order=order, size_divisibility=divisor)
    random = np.random.default_rng(1)
    shapes = [(50, 60), (70, 90), (100, 70), (40, 200), (1, 30), (300, 400)]  # larger and smaller than their input
    images = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    sizes, flips = [input_size(*shape, options) for shape in shapes], [False, True, True, False, True, True]
    expected = inputs_one_by_one(images, sizes, flips, options)
    batch = Batch(PackedImages.from_images(images), sizes, flips, padded_shape(sizes, divisor), [], [])
    found = batch.inputs(options, CPU)
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
    assert [side % divisor for side in found.shape[2:]] == [0, 0]
    # The last image is larger than its input, so a worker sends the input instead.
    assert [input_is_smaller(size) for size in sizes] == [False] * 5 + [True]
    small = network_input(images[5][:, ::-1], sizes[5], options).numpy()
    mixed = Batch(PackedImages.from_images([*images[:5], small]), sizes, flips, batch.shape, [], [])
    assert torch.equal(mixed.inputs(options, CPU), expected)
    assert mixed.images.data.numel() < batch.images.data.numel()


def test_workers_send_inputs_that_are_smaller_than_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, source = CocoIndex.load(squares(tmp_path)), ImageSource.open(tmp_path / "images")
    recipe = tiny("input.min_sizes=[24]")  # of images of 64x96
    batch = training_batches.TrainingBatches(index, source, recipe)[0]
    assert isinstance(batch, Batch) and {dtype for dtype, _ in batch.images.layouts} == {torch.float32}
    found = batch.inputs(recipe.input, CPU)
    monkeypatch.setattr(training_batches, "input_is_smaller", lambda size: False)
    raw = training_batches.TrainingBatches(index, source, recipe)[0]
    assert isinstance(raw, Batch) and {dtype for dtype, _ in raw.images.layouts} == {torch.uint8}
    assert torch.equal(found, raw.inputs(recipe.input, CPU))
    assert [t.boxes.tolist() for t in batch.targets] == [t.boxes.tolist() for t in raw.targets]


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
@pytest.mark.parametrize("short_side", [24, 100])
def test_image_bytes_predicts_the_size_of_a_batch(resize: str, short_side: int, tmp_path: Path) -> None:
    index, source = CocoIndex.load(squares(tmp_path)), ImageSource.open(tmp_path / "images")
    recipe = tiny(f"input.min_sizes=[{short_side}]", f"input.resize={resize}")  # of images of 64x96
    batch = training_batches.TrainingBatches(index, source, recipe)[0]
    assert isinstance(batch, Batch)
    each = [training_batches.image_bytes(size, recipe.input) for size in batch.sizes]
    assert sum(each) <= batch.images.data.numel() <= sum(each) + 3 * len(each)
    assert sum(each) <= len(each) * 3 * 64 * 96 or resize == "pillow"


def test_pillow_resizes_before_flipping_as_detectron2_does(tmp_path: Path) -> None:
    index, source = CocoIndex.load(squares(tmp_path)), ImageSource.open(tmp_path / "images")
    recipe = tiny("input.min_sizes=[48]", "input.resize=pillow")
    batch = training_batches.TrainingBatches(index, source, recipe)[0]
    assert isinstance(batch, Batch) and {dtype for dtype, _ in batch.images.layouts} == {torch.uint8}
    records = {record.id: record for record in index.images.values()}
    for found, id_, size, flip in zip(
        batch.inputs(recipe.input, CPU), batch.image_ids, batch.sizes, batch.flips, strict=True
    ):
        expected = network_input(source.read(records[id_]), size, recipe.input)
        assert torch.equal(found[:, : size.height, : size.width], expected.flip(2) if flip else expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=5), st.integers(1, 70))
def test_padding_is_the_smallest_that_fits(shapes: list[tuple[int, int]], divisor: int) -> None:
    sizes = [input_size(*shape, InputOptions(min_sizes=(50,))) for shape in shapes]
    for side, padded in enumerate(padded_shape(sizes, divisor)):
        longest = max((size.height, size.width)[side] for size in sizes)
        assert padded % divisor == 0 and longest <= padded < longest + divisor
