"""With a real detector on the CPU, the store does not depend on workers, interruptions or broken images, to the bit.

It depends on the batch size by rounding only.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from store_examples import contents

from refdet import store
from refdet.config import recipe
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_source import ImageSource
from refdet.data.instances_provenance import provenance_of_instances
from refdet.detector import checkpoint
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.errors import InputError, Interrupted
from refdet.extraction.extract import extract_features
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.extraction.summary import Summary
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow

SMALL = ["model.width=8", "model.rpn_channels=16", "model.mask_channels=8", "input.min_sizes=[96]",
         "input.max_size=160", "proposals.post_nms_top_n_test=40"]  # fmt: skip
PYRAMID = ["model.fpn_channels=16", "model.fc_dim=32"]
IMAGES = 38  # more than one shard


@pytest.fixture(scope="module", params=["c4-res18", "demo"])
def detector(request: pytest.FixtureRequest, shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    index = CocoIndex.load(shapes_root / "annotations" / "instances_train2014.json")
    changes = [*SMALL, "model.norm=batch", "model.zero_init_residual=true"]
    if request.param == "demo":
        changes += PYRAMID
    small_recipe = recipe.load(request.param).with_changes(changes)
    torch.manual_seed(0)
    model = MaskRCNN(small_recipe, len(index.categories))
    categories = tuple(index.categories.items())
    meta = checkpoint.CheckpointMetadata(small_recipe, categories, provenance_of_instances(index), 0)
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, model, meta)
    return folder


@pytest.fixture(scope="module")
def images(shapes_root: Path) -> ImageList:
    every = ImageList.of_instances(shapes_root / "annotations" / "instances_train2014.json")
    return ImageList(every.records[:IMAGES], every.index, every.name)


@pytest.fixture(scope="module")
def folder(shapes_root: Path) -> Path:
    return shapes_root / "train2014"


def options(regions: str) -> ExtractOptions:
    return ExtractOptions(regions=regions, score_threshold=0.05, max_regions=20)


def run(
    out: Path, detector: Path, folder: Path, images: ImageList, regions: str = "detections", **others: int
) -> Summary:
    return extract_features(detector, folder, out, images, options=options(regions), device="cpu", **others)


@pytest.fixture(scope="module")
def whole(detector: Path, folder: Path, images: ImageList, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "a.h5"
    summary = run(out, detector, folder, images, workers=1)
    assert summary.errors == 0 and summary.regions > IMAGES
    return out


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_does_not_change_the_store(
    whole: Path, detector: Path, folder: Path, images: ImageList, tmp_path: Path, workers: int
) -> None:
    run(tmp_path / "a.h5", detector, folder, images, workers=workers)
    assert contents(tmp_path / "a.h5") == contents(whole)


@pytest.mark.parametrize("at", [0, 20, IMAGES - 1])
def test_an_interruption_does_not_change_the_store(
    whole: Path,
    detector: Path,
    folder: Path,
    images: ImageList,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    read = ImageSource.read

    def interrupted_read(self: ImageSource, record: ImageRecord) -> np.ndarray:
        if record == images.records[at]:
            raise KeyboardInterrupt
        return read(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "read", interrupted_read)
        with pytest.raises(Interrupted, match="`resume=True`"):
            run(tmp_path / "a.h5", detector, folder, images)
    with pytest.raises(InputError, match="`batch_size` was 4 and is now 2"):
        run(tmp_path / "a.h5", detector, folder, images, batch_size=2, resume=True)
    done = run(tmp_path / "a.h5", detector, folder, images, workers=3, resume=True)
    if at < IMAGES - 1:
        assert done.computed == IMAGES
    else:  # the first shard, of 32 images, was finished
        assert 0 < done.computed <= IMAGES - 32
    assert contents(tmp_path / "a.h5") == contents(whole)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_batch_size_changes_the_store_by_rounding_only(
    whole: Path, detector: Path, folder: Path, images: ImageList, tmp_path: Path, size: int
) -> None:
    run(tmp_path / "a.h5", detector, folder, images, batch_size=size)
    with store.open(tmp_path / "a.h5") as found, store.open(whole) as expected:
        assert found.options == expected.options
        for image_id in expected:
            assert_near(found[image_id], expected[image_id])


def assert_near(found: Regions, expected: Regions) -> None:
    np.testing.assert_array_equal(found.category_ids, expected.category_ids)
    assert found.masks == expected.masks
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    for name, values in expected.features.items():
        scale = float(np.abs(values).max(initial=1e-9))
        np.testing.assert_allclose(found.features[name], values, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("regions", ["detections", "annotations"])
def test_broken_images_do_not_change_the_regions_of_others(
    detector: Path, folder: Path, images: ImageList, tmp_path: Path, regions: str
) -> None:
    run(tmp_path / "whole.h5", detector, folder, images, regions)
    shutil.copytree(folder, tmp_path / "images")
    broken = {record.id: tmp_path / "images" / record.file_name for record in images.records[1::3]}
    for image_id, path in broken.items():
        path.write_bytes(path.read_bytes()[: 100 + image_id % 300])
    assert run(tmp_path / "a.h5", detector, tmp_path / "images", images, regions).errors == len(broken)
    with store.open(tmp_path / "a.h5") as found, store.open(tmp_path / "whole.h5") as whole:
        assert found.errors.keys() == broken.keys()
        for image_id in whole:
            if image_id in broken:
                assert broken[image_id].name in found.errors[image_id] and len(found[image_id]) == 0
                continue
            actual, expected = found[image_id], whole[image_id]
            assert actual.masks == expected.masks
            for name in ("boxes", "scores", "category_ids"):
                np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
            assert actual.features.keys() == expected.features.keys()
            for name in expected.features:
                np.testing.assert_array_equal(actual.features[name], expected.features[name])
