"""Batches that fit, and what happens to those that do not."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from refdet.cli.main import main
from test_folding import trained_model

from refdet import batch_size
from refdet.batch_size import fitting_batch_size, halving
from refdet.data.coco import ImageRecord
from refdet.detector.inference import DetectOptions

RECORDS = [ImageRecord(i, "", 20, 30) for i in range(7)]
IMAGES = [np.zeros((20, 30, 3), np.uint8)] * 7


@pytest.mark.parametrize("fits", [1, 2, 3, 7])
def test_a_batch_that_does_not_fit_is_cut(fits: int) -> None:
    sizes = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        assert len(batch) == len(images)
        if len(batch) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return lambda: [record.id for record in batch]

    assert halving(compute)(RECORDS, IMAGES)() == list(range(7))
    assert max(sizes) <= fits and (fits < 7 or sizes == [7])


def test_one_image_that_does_not_fit_is_an_error() -> None:
    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        halving(compute)(RECORDS, IMAGES)


@pytest.mark.parametrize(("free", "size"), [(0.1, 1), (2.6, 2), (3.9, 2), (5.1, 4), (500, 4)])
def test_on_the_cpu_it_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch, free: float, size: int) -> None:
    pages = {"SC_AVPHYS_PAGES": int(free * 2**30 / 4096), "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(batch_size.os, "sysconf", pages.__getitem__)
    detector = SimpleNamespace(model=trained_model())
    assert fitting_batch_size(detector, RECORDS, DetectOptions()) == size  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_another_batch_size_is_refused(text: str) -> None:
    arguments = ["extract-features", "--checkpoint", "x", "--images", "x", "--out", "x", "--instances", "x"]
    result = CliRunner().invoke(main, [*arguments, "--batch-size", text])
    assert result.exit_code == 2 and "from 1 up" in result.output
