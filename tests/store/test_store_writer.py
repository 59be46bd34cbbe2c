"""Writing a store: scores of given boxes, the order of images, and partial writes by the operating system."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sound_regions import HEADER, draw

from refdet import store
from refdet.store.codec import encode
from refdet.store.verify import verify


@pytest.mark.usefixtures("check_hdf5_in_process")
def test_scores_must_be_probabilities_unless_boxes_were_given(tmp_path: Path) -> None:
    columns = store.Columns()
    rows = [store.ImageRow(1, "a.jpg", height=9, width=7, error="", regions=2, mask_bytes=0)]
    for boxes_given, score, is_valid in (
        (True, 12.5, True), (False, 12.5, False), (True, np.nan, False), (True, -1, True),
    ):  # fmt: skip
        path = tmp_path / "a.h5"
        header = replace(HEADER, options={"boxes_sha256": "0"} if boxes_given else {})  # hash of the file of --boxes
        with store.create(path, header, columns, rows) as writer:
            writer.put(replace(draw(1, 2, columns), scores=np.array([score, 0.5], np.float32)))
        assert [problem.part for problem in verify(path).problems] == ([] if is_valid else ["regions/score"])


def test_images_must_be_put_in_the_order_of_the_rows(tmp_path: Path) -> None:
    columns = store.Columns()
    rows = [store.ImageRow(i, "a.jpg", height=9, width=7, error="", regions=1, mask_bytes=0) for i in (1, 2)]
    with (
        pytest.raises(ValueError, match="image 2: expected image 1 next"),
        store.create(tmp_path / "a.h5", HEADER, columns, rows) as writer,
    ):
        writer.put(draw(2, 1, columns))
    with (
        pytest.raises(ValueError, match="image 2: expected no image next"),
        store.create(tmp_path / "a.h5", HEADER, columns, rows) as writer,
    ):
        for i in (1, 2, 2):
            writer.put(draw(i, 1, columns))
    with (
        pytest.raises(ValueError, match="1 image was not written, first: 2"),
        store.create(tmp_path / "a.h5", HEADER, columns, rows) as writer,
    ):
        writer.put(draw(1, 1, columns))
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.usefixtures("check_hdf5_in_process")
@pytest.mark.parametrize("has_pwritev", [True, False])  # macOS 10 has no pwritev
def test_rows_are_complete_after_partial_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pwritev: bool
) -> None:
    columns = store.Columns({"large": (70_000,), "small": (3,)}, masks=True, ann_ids=True)
    images = [draw(i, n, columns) for i, n in enumerate((2, 0, 1, 40, 1))]  # n regions
    rows = [encode(image, columns).row for image in images]
    pwrite, sizes = os.pwrite, []

    def write_partially(descriptor: int, data: memoryview | list[memoryview], offset: int) -> int:
        data = b"".join(data) if isinstance(data, list) else data
        sizes.append(len(data))
        return pwrite(descriptor, data[:100_000], offset)  # so that more than that takes several calls

    if has_pwritev:
        monkeypatch.setattr(os, "pwritev", write_partially, raising=False)
    else:
        monkeypatch.delattr(os, "pwritev", raising=False)
        monkeypatch.setattr(os, "pwrite", write_partially)
    with store.create(tmp_path / "a.h5", HEADER, columns, rows) as writer:
        writer.put(*images[:2])
        for image in images[2:]:
            writer.put(image)
    assert max(sizes) > 2**18 and min(sizes) < 1000  # some writes were cut off, and some were not
    assert not verify(tmp_path / "a.h5").problems
    with store.open(tmp_path / "a.h5") as found:
        for image in images:
            for name, values in image.features.items():
                np.testing.assert_array_equal(found[image.image_id].features[name], values)
