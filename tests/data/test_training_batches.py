"""TrainingBatches: which images a step has, their input sizes, targets and padding; grouping images by input size."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refdet.config import recipe as recipes
from refdet.config.recipe import InputOptions, Recipe
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_source import ImageError, ImageSource
from refdet.data.training_batches import Batch, TrainingBatches, group_by_input_size
from refdet.data.transforms import input_size
from refdet.errors import InputError


def write_dataset(root: Path, sizes: list[tuple[int, int]]) -> tuple[CocoIndex, ImageSource]:
    """Images of the given (height, width) with a square object and a crowd each, and a last one without objects."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for image, (height, width) in enumerate([*sizes, (50, 50)], start=1):
        Image.new("RGB", (width, height), (image, 0, 0)).save(root / "images" / f"{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "height": height, "width": width})
        if image > len(sizes):
            continue
        square = {"bbox": [4, 6, 20, 20], "segmentation": [[4, 6, 24, 6, 24, 26, 4, 26]], "area": 400}
        crowd = {"bbox": [30, 6, 10, 10], "segmentation": {"size": [height, width], "counts": [height * width]}}
        annotations.append({"id": image, "image_id": image, "category_id": 7, "iscrowd": 0, **square})
        annotations.append({"id": 1000 + image, "image_id": image, "category_id": 7, "iscrowd": 1, **crowd})
    file = root / "instances.json"
    categories = [{"id": 7, "name": "square", "supercategory": "shape"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return CocoIndex.load(file), ImageSource.open(root / "images")


def small_recipe(*changes: str) -> Recipe:
    return recipes.load("demo").with_changes(["train.batch_size=3", "train.steps=100", *changes])


def inputs(batches: TrainingBatches, batch: Batch) -> torch.Tensor:
    return batch.inputs(batches.recipe.input, torch.device("cpu"))


def test_an_epoch_has_each_annotated_image_once(tmp_path: Path) -> None:
    index, source = write_dataset(tmp_path, [(50, 60)] * 6 + [(60, 50)] * 6)
    batches = TrainingBatches(index, source, small_recipe())
    for epoch in range(2):
        seen = [i for step in range(4) for i in batches[epoch * 4 + step].image_ids]
        assert sorted(seen) == list(range(1, 13))
    shapes = {batches[step].shape for step in range(4)}
    assert len(shapes) == 2  # landscape and portrait apart
    assert [batches[s].image_ids for s in range(4)] != [batches[s + 4].image_ids for s in range(4)]


@pytest.mark.parametrize(("landscape", "portrait", "batch_size"), [(9, 2, 4), (2, 9, 4), (8, 3, 4), (5, 5, 7)])
def test_all_images_are_used_equally_often_over_many_epochs(
    tmp_path: Path, landscape: int, portrait: int, batch_size: int
) -> None:
    """For example, portrait images must occur even if there are fewer of them than a batch holds."""
    index, source = write_dataset(tmp_path, [(50, 60)] * landscape + [(60, 50)] * portrait)
    batches = TrainingBatches(index, source, small_recipe(f"train.batch_size={batch_size}"))
    seen: Counter[int] = Counter()
    for epoch in range(100):
        plan = np.concatenate(batches._plan_epoch(epoch)).tolist()
        assert len(plan) == len(set(plan)) == batches.steps_per_epoch * batch_size
        seen.update(plan)
    kept = batches.steps_per_epoch * batch_size / (landscape + portrait)
    assert len(seen) == landscape + portrait and min(seen.values()) > 70 * kept


def test_a_batch_repeats_images_if_there_are_too_few(tmp_path: Path) -> None:
    index, source = write_dataset(tmp_path, [(50, 60)] * 2)
    assert set(TrainingBatches(index, source, small_recipe())[5].image_ids) == {1, 2}


def test_a_batch_depends_only_on_the_step_and_the_seed(tmp_path: Path) -> None:
    index, source = write_dataset(tmp_path, [(50, 60)] * 9)
    one, other = (TrainingBatches(index, source, small_recipe()) for _ in range(2))
    _ = other[0]
    assert torch.equal(inputs(one, one[7]), inputs(other, other[7])) and one[7].image_ids == other[7].image_ids
    third = TrainingBatches(index, source, small_recipe("train.seed=1"))
    assert any(third[s].image_ids != one[s].image_ids for s in range(3))


def test_boxes_are_scaled_and_flipped_with_the_image(tmp_path: Path) -> None:
    index, source = write_dataset(tmp_path, [(50, 100)] * 3)
    batches = TrainingBatches(index, source, small_recipe("input.min_sizes=[100]", "input.max_size=400"))
    seen: Counter[bool] = Counter()
    for step in range(6):
        batch = batches[step]
        assert isinstance(batch, Batch)
        assert batch.input_sizes == [(100, 200)] * 3
        for truth in batch.targets:
            mirrored = truth.flipped_width is not None
            seen[mirrored] += 1
            expected = [200 - 48, 12, 200 - 8, 52] if mirrored else [8, 12, 48, 52]
            assert truth.boxes.tolist() == [expected]
            assert truth.labels.tolist() == [1]
            assert truth.crowds.tolist() == [[200 - 80, 12, 200 - 60, 32] if mirrored else [60, 12, 80, 32]]
            assert truth.scale == (2.0, 2.0)
            assert len(truth.masks or []) == 1
    assert seen[True] > 3 and seen[False] > 3


def test_padding_is_zero_after_normalization(tmp_path: Path) -> None:
    index, source = write_dataset(tmp_path, [(50, 60), (40, 60), (50, 52)])
    batches = TrainingBatches(index, source, small_recipe("input.min_sizes=[50]"))
    batch = batches[0]
    for image, (height, width) in zip(inputs(batches, batch), batch.input_sizes, strict=True):
        assert image[:, height:].eq(0).all() and image[:, :, width:].eq(0).all()
        assert image[:, :height, :width].ne(0).all()


def test_errors_name_missing_and_broken_images(tmp_path: Path) -> None:
    index, _ = write_dataset(tmp_path, [(50, 60)] * 3)
    (tmp_path / "images" / "2.png").write_bytes(b"broken")
    found = TrainingBatches(index, ImageSource.open(tmp_path / "images"), small_recipe())[0]
    assert isinstance(found, ImageError) and "2.png" in str(found)
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images .* first: 2\.png"):
        TrainingBatches(index, ImageSource.open(tmp_path / "images"), small_recipe())


SIDES = [40, 50, 60, 70]
SHAPES = [(50, 60), (60, 50), (50, 90), (90, 50), (50, 50), (60, 80), (80, 60), (55, 70), (70, 55)]


def short_sides(batches: TrainingBatches, steps: range) -> dict[tuple[int, int], int]:
    """{(step, image id): short side of its input}, for the images of this process."""
    found: dict[tuple[int, int], int] = {}
    number, processes = batches.rank, batches.world_size
    for step in steps:
        batch = batches[step]
        assert isinstance(batch, Batch)
        count = len(batch.image_ids)
        own = batch.image_ids[number * count // processes : (number + 1) * count // processes]
        for image, (height, width) in zip(own, batch.input_sizes, strict=True):
            found[step, image] = min(height, width)
    return found


def test_short_sides_depend_only_on_seed_step_and_image(tmp_path: Path) -> None:
    index, source = write_dataset(tmp_path, SHAPES)
    changes = [f"input.min_sizes={SIDES}", "input.max_size=400", "train.batch_size=4"]
    of_one = short_sides(TrainingBatches(index, source, small_recipe(*changes)), range(60))
    counts = Counter(of_one.values())
    assert sorted(counts) == SIDES and min(counts.values()) > len(of_one) / len(SIDES) * 0.6
    shares = [TrainingBatches(index, source, small_recipe(*changes), rank=n, world_size=2) for n in range(2)]
    of_both = [short_sides(share, range(60)) for share in shares]
    assert of_both[0] | of_both[1] == of_one and not of_both[0].keys() & of_both[1].keys()
    for step in range(5):  # padded the same
        assert shares[0][step].shape == shares[1][step].shape  # type: ignore[union-attr]
    assert any(len({of_one[step, i] for s, i in of_one if s == step}) > 1 for step in range(60))
    # the same image in the same step of batches of another size
    others = short_sides(TrainingBatches(index, source, small_recipe(*changes, "train.batch_size=2")), range(60))
    shared = of_one.keys() & others.keys()
    assert len(shared) > 20 and all(of_one[key] == others[key] for key in shared)
    reseeded = short_sides(TrainingBatches(index, source, small_recipe(*changes, "train.seed=1")), range(60))
    assert any(of_one[key] != reseeded[key] for key in of_one.keys() & reseeded.keys())
    images = {image for _, image in of_one}
    assert all(len({side for (_, other), side in of_one.items() if other == image}) > 1 for image in images)


def test_recipes_of_older_runs_draw_one_short_side_per_step(tmp_path: Path) -> None:
    """They draw one side per step, and the flips, from the same random numbers as before, so resuming repeats them."""
    index, source = write_dataset(tmp_path, SHAPES)
    tree = small_recipe(f"input.min_sizes={SIDES}", "input.max_size=400").to_dict()
    del tree["input"]["short_side_per"]
    batches = TrainingBatches(index, source, recipes.from_dict(tree))
    for step in range(20):
        batch, random = batches[step], np.random.default_rng((batches.recipe.train.seed, 1, step))
        assert isinstance(batch, Batch)
        assert {min(size) for size in batch.input_sizes} == {random.choice(SIDES)}
        assert batch.flips == (random.random(3) < 0.5).tolist()


@pytest.mark.parametrize("changes", [[], ["input.crop_size=64"], ["input.short_side_per=step"]])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 12])
def test_largest_batch_is_an_upper_bound(tmp_path: Path, batch_size: int, changes: list[str]) -> None:
    index, source = write_dataset(tmp_path, SHAPES)
    more = [f"input.min_sizes={SIDES[::-1]}", "input.max_size=110", f"train.batch_size={batch_size}", *changes]
    batches = TrainingBatches(index, source, small_recipe(*more, "train.steps=100"))
    largest = batches.largest_batch()
    assert isinstance(largest, Batch) and len(largest.input_sizes) == batch_size
    found = [np.prod(batches[step].shape) for step in range(60)]  # type: ignore[union-attr]
    assert max(found) <= np.prod(largest.shape)
    if batch_size == 1 or changes == ["input.crop_size=64"]:
        assert max(found) == np.prod(largest.shape)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(20, 25), st.integers(20, 25)), max_size=40),
    st.integers(1, 5),
)
def test_group_by_input_size(sizes: list[tuple[int, int]], batch_size: int) -> None:
    records = [ImageRecord(i, "", *size) for i, size in enumerate(sizes)]
    options = InputOptions(min_sizes=(20,), max_size=40)
    batches = group_by_input_size(records, options, batch_size)
    assert sorted(r.id for batch in batches for r in batch) == list(range(len(sizes)))
    unfilled = []
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        shapes = {(s.height, s.width) for s in (input_size(r.height, r.width, options) for r in batch)}
        assert len(shapes) == 1
        assert [r.id for r in batch] == sorted(r.id for r in batch)
        unfilled += list(shapes) if len(batch) < batch_size else []
    assert len(set(unfilled)) == len(unfilled)  # no two batches that could have been one


@pytest.mark.parametrize("resize", ["antialias", "opencv"])
def test_images_of_extreme_shapes_can_be_mirrored(tmp_path: Path, resize: str) -> None:
    """NumPy calls a mirrored column of pixels contiguous despite its negative stride, which PyTorch refuses."""
    shapes = [(1, 1), (2, 2), (1, 50), (50, 1), (3, 400), (400, 3), (1, 5000), (5000, 1)]
    images, annotations = [], []
    for number, (height, width) in enumerate(shapes, start=1):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        outline = [[0, 0, width, 0, width, height, 0, height]]
        annotations.append({"id": number, "image_id": number, "category_id": 7, "iscrowd": 0, "segmentation": outline,
                            "bbox": [0, 0, width, height], "area": width * height})  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "all of it"}]}
    (tmp_path / "i.json").write_text(json.dumps(content))
    index, source = CocoIndex.load(tmp_path / "i.json"), ImageSource.open(tmp_path)
    batches = TrainingBatches(index, source, small_recipe("train.batch_size=1", f"input.resize={resize}"))
    mirrored: dict[tuple[int, bool], torch.Tensor] = {}
    for step in range(100):
        batch = batches[step]
        assert isinstance(batch, Batch)
        mirrored[batch.image_ids[0], batch.targets[0].flipped_width is not None] = inputs(batches, batch)[0]
        [box] = batch.targets[0].boxes.tolist()
        height, width = batch.input_sizes[0]
        assert box == pytest.approx([0, 0, width, height], abs=1)
    assert len(mirrored) == 2 * len(shapes)
    for number in range(1, len(shapes) + 1):
        one, other = mirrored[number, True].flip(2), mirrored[number, False]
        assert one.shape == other.shape
        if resize == "antialias":  # opencv samples at the exact scale from the left edge, so mirroring changes it
            torch.testing.assert_close(one, other, atol=0.02, rtol=0)
