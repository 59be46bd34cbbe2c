"""Extraction from 500 damaged images: each is skipped with its reason, and the others are not affected."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damaged_images import HEIGHT, WIDTH, Damaged, all_damaged, bomb, encoded, photograph, write_zip
from interrupted_extraction import environment
from PIL import ImageFile
from store_examples import HEADER, PLAN

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.data.image_source import ImageError, ImageSource
from refdet.extraction.pipeline import extract
from refdet.extraction.steps import Finish
from refdet.structures.regions import Regions

# pytest captures warnings in its own way; `test_pillow_prints_no_warnings` checks what a user sees.
pytestmark = [pytest.mark.filterwarnings("ignore:Image size"), pytest.mark.filterwarnings("ignore:Palette images")]

DAMAGED = {i: damaged for i, damaged in zip(range(0, 10_000, 3), all_damaged(), strict=False)}
GOOD = [i for i in range(3 * len(DAMAGED) // 2) if i not in DAMAGED]
RECORDS = [ImageRecord(i, f"{i}.jpg", HEIGHT, WIDTH) for i in sorted([*DAMAGED, *GOOD])]
BATCHES = [RECORDS[i : i + 4] for i in range(0, len(RECORDS), 4)]
PLAN_OF_PIXELS = replace(PLAN, features=("pixels", "batch"), masks=False, ann_ids=False)


def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
    """One region per image, whose features are the image's pixels and the size of its batch."""
    return lambda: [
        Regions(
            record.id, record.file_name, record.height, record.width,
            np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.ones(1, np.int64),
            features={"pixels": image.reshape(1, -1), "batch": np.full((1, 1), len(batch))},
        )
        for record, image in zip(batch, images, strict=True)
    ]  # fmt: skip


def run(out: Path, images: Path, records: list[ImageRecord] = RECORDS) -> dict[int, Regions]:
    image_ids = {record.id for record in records}
    batches = [kept for batch in BATCHES if (kept := [r for r in batch if r.id in image_ids])]
    extract(out, PLAN_OF_PIXELS, HEADER, batches, records, ImageSource.open(images).read, compute)
    with store.open(out) as extracted:
        return {i: extracted[i] for i in extracted}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged")
    random = np.random.default_rng(1)
    for i in GOOD:
        (path / f"{i}.jpg").write_bytes(encoded(photograph(random), "JPEG"))
    for i, damaged in DAMAGED.items():
        damaged.write(path / f"{i}.jpg")
    return path


@pytest.fixture(scope="module")
def extracted_clean(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Regions]:
    """The regions if every damaged image is replaced by an intact one."""
    path = tmp_path_factory.mktemp("clean")
    for record in RECORDS:
        good = folder / f"{record.id if record.id in GOOD else GOOD[0]}.jpg"
        os.link(good, path / record.file_name)
    return run(path / "a.h5", path)


@pytest.fixture(scope="module")
def extracted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Regions]:
    return run(tmp_path_factory.mktemp("found") / "a.h5", folder)


def check_damaged_image(extracted: Regions, name: str, damaged: Damaged) -> None:
    """Check that an image was read as its `Damaged` record requires, or refused with the required reason."""
    if damaged.pixels is not None:
        assert not extracted.error, (damaged.kind, extracted.error)
        difference = np.abs(extracted.features["pixels"].reshape(HEIGHT, WIDTH, 3) - damaged.pixels.astype(np.float32))
        assert difference.max() <= damaged.tolerance, (damaged.kind, difference.max())
    elif extracted.error or not damaged.may_be_readable:
        assert name in extracted.error and len(extracted) == 0, damaged.kind
        assert damaged.may_be_readable or damaged.says in extracted.error, (damaged.kind, extracted.error)


def test_500_damaged_images_do_not_affect_the_others(
    extracted: dict[int, Regions], extracted_clean: dict[int, Regions]
) -> None:
    assert len(DAMAGED) == 500
    for i in GOOD:
        for name, values in extracted_clean[i].features.items():
            np.testing.assert_array_equal(extracted[i].features[name], values)
    for i, damaged in DAMAGED.items():
        check_damaged_image(extracted[i], f"{i}.jpg" if "no file" not in damaged.says else f"image {i}", damaged)


def test_a_damaged_zip_gives_the_same_regions_and_reasons(
    folder: Path, extracted: dict[int, Regions], tmp_path: Path
) -> None:
    zippable = [r for r in RECORDS if r.id in GOOD or (DAMAGED[r.id].zipped and (folder / r.file_name).is_file())]
    corrupt = [f"{i}.jpg" for i in GOOD[::5]]
    write_zip(tmp_path / "images.zip", folder, [r.file_name for r in zippable], corrupt)
    for i, regions in run(tmp_path / "a.h5", tmp_path / "images.zip", zippable).items():
        if f"{i}.jpg" in corrupt:
            assert f"{i}.jpg: not a readable image (Bad CRC-32" in regions.error
        elif regions.error:
            assert regions.error == extracted[i].error.replace(str(folder), str(tmp_path / "images.zip" / "train2014"))
        else:
            np.testing.assert_array_equal(regions.features["pixels"], extracted[i].features["pixels"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_an_image_error(tmp_path: Path) -> None:
    path = tmp_path / "1.jpg"
    path.write_bytes(encoded(photograph(np.random.default_rng(0)), "JPEG"))
    path.chmod(0)
    with pytest.raises(ImageError, match="1.jpg: not a readable image .*Permission denied"):
        ImageSource.open(tmp_path).read(ImageRecord(1, "1.jpg", HEIGHT, WIDTH))


def test_an_image_of_another_size_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise AssertionError("decoded")

    (tmp_path / "1.jpg").write_bytes(bomb(12_000, 12_000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match="1.jpg: is 12000x12000, but the instances file says 64x48"):
        ImageSource.open(tmp_path).read(ImageRecord(1, "1.jpg", HEIGHT, WIDTH))


def test_pillow_prints_no_warnings(folder: Path) -> None:
    code = (
        "import sys, test_damaged_images as t; from pathlib import Path\n"
        "source = t.ImageSource.open(Path(sys.argv[1]))\n"
        "for record in t.RECORDS:\n"
        "    try: source.read(record)\n"
        "    except t.ImageError: pass\n"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(folder)]
    process = subprocess.run(command, env=environment(Path(__file__).parent), capture_output=True, text=True)
    assert process.returncode == 0
    warnings = [line for line in process.stderr.splitlines() if "PIL" in line or "image" in line.lower()]
    assert not warnings
