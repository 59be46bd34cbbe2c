"""Batches that fit, and what happens to those that do not."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from trained_models import IDS, trained_model

from refdet.cli.main import main
from refdet.config import recipe as recipes
from refdet.data.coco import ImageRecord
from refdet.device import as_out_of_memory_error
from refdet.extraction import batch_size
from refdet.extraction.batch_size import MeasuredBatch, auto_batch_size, measure_batch_size, split_on_oom
from refdet.extraction.options import ExtractOptions
from refdet.structures.detection_options import DetectionOptions

RECORDS = [ImageRecord(i, "", 20, 30) for i in range(7)]
IMAGES = [np.zeros((20, 30, 3), np.uint8)] * 7
NO_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.mark.parametrize("fits", [1, 2, 3, 7])
def test_a_batch_that_does_not_fit_is_cut(fits: int) -> None:
    sizes = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        assert len(batch) == len(images)
        if len(batch) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return lambda: [record.id for record in batch]

    assert split_on_oom(compute)(RECORDS, IMAGES)() == list(range(7))
    assert max(sizes) <= fits and (fits < 7 or sizes == [7])


@pytest.mark.parametrize("error", NO_MEMORY)
def test_one_image_that_does_not_fit_is_an_error(error: RuntimeError) -> None:
    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        raise error

    with pytest.raises(torch.cuda.OutOfMemoryError, match=re.escape(str(error))):
        split_on_oom(compute)(RECORDS, IMAGES)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_library_without_memory_has_a_batch_cut(error: RuntimeError) -> None:
    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        if len(batch) > 2:
            raise error
        return lambda: [record.id for record in batch]

    assert split_on_oom(compute)(RECORDS, IMAGES)() == list(range(7))


@pytest.mark.parametrize(("free", "cut"), [(2**20, True), (2**33, False)])
@pytest.mark.parametrize("text", [
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "GET was unable to find an engine to execute this computation",
])  # fmt: skip
def test_an_error_that_may_have_other_causes_counts_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, text: str, free: int, cut: bool
) -> None:
    tried = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        tried.append(len(batch))
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**36))
    with pytest.raises(torch.cuda.OutOfMemoryError if cut else RuntimeError, match=re.escape(text)) as caught:
        split_on_oom(compute)(RECORDS, IMAGES)
    assert tried == ([7, 3, 1] if cut else [7])
    assert isinstance(caught.value, torch.cuda.OutOfMemoryError) == cut


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access was encountered", "shape mismatch", ""])
def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tried = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        tried.append(len(batch))
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**36))
    with pytest.raises(RuntimeError) as caught:
        split_on_oom(compute)(RECORDS, IMAGES)
    assert tried == [7] and type(caught.value) is RuntimeError and str(caught.value) == text


def test_a_gpu_that_cannot_be_used_any_more_is_not_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[int, int]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_INTERNAL_ERROR"), as_out_of_memory_error():
        raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")


def test_what_was_too_large_once_is_not_tried_again() -> None:
    tried = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return lambda: [record.id for record in batch]

    cut = split_on_oom(compute)
    assert cut(RECORDS, IMAGES)() == list(range(7))
    assert tried == [7, 3, 1, 2, 2, 2]
    tried.clear()
    assert cut(RECORDS, IMAGES)() == list(range(7))
    assert tried == [1, 2, 2, 2]
    assert cut(RECORDS[:2], IMAGES[:2])() == [0, 1]
    assert tried == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(("free", "size"), [(0.1, 1), (2.6, 2), (3.9, 2), (5.1, 4), (500, 4)])
def test_on_the_cpu_it_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch, free: float, size: int) -> None:
    monkeypatch.setattr(batch_size, "available_bytes", lambda: int(free * 2**30))
    detector = SimpleNamespace(model=trained_model())
    assert auto_batch_size(detector, RECORDS, DetectionOptions(), ()) == size  # type: ignore[arg-type]


class Gpu:
    """Memory of a GPU as PyTorch tells of it: a detector takes `held`, libraries `kept`, and a batch `needed`."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        total: int,
        needed: Callable[[int], int],
        held: int = 100,
        kept: int = 0,
        error: RuntimeError = NO_MEMORY[0],
    ) -> None:
        self.peak, self.allocated = 0, held
        self.batches = list[tuple[int, tuple[int, ...], DetectionOptions]]()

        def start(
            model: SimpleNamespace,
            images: list[np.ndarray],
            records: list[ImageRecord],
            ids: object,
            options: DetectionOptions,
            *,
            features: tuple[str, ...],
        ) -> None:
            assert len(images) == len(records) and model.profiler is None
            self.batches.append((len(images), images[0].shape, options))
            peak = held + kept + needed(len(images))
            if peak > total:
                raise error
            self.peak, self.allocated = max(self.peak, peak), held + kept

        def begin(device: torch.device) -> None:
            self.peak = self.allocated

        block = 8  # the detector's last block, of which a part is unused
        monkeypatch.setattr(batch_size, "start_detecting", start)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begin)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.allocated + block)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (total - self.allocated - block, total))

    def measured(self) -> MeasuredBatch:
        parameters = [SimpleNamespace(device=torch.device("cuda"))]
        profiler = object()
        model = SimpleNamespace(parameters=lambda: iter(parameters), profiler=profiler)
        meta = SimpleNamespace(recipe=recipes.load("demo"), category_ids=IDS)
        detector, options = (
            SimpleNamespace(model=model, meta=meta),
            DetectionOptions(score_threshold=0.5, max_regions=36),
        )
        records = [ImageRecord(0, "", 100, 300), ImageRecord(1, "", 200, 250), ImageRecord(2, "", 10, 300)]
        found = measure_batch_size(detector, records, options, ())  # type: ignore[arg-type]
        assert auto_batch_size(detector, records, options, ()) == found.size  # type: ignore[arg-type]
        assert model.profiler is profiler
        return found

    def tried(self) -> list[int]:
        return [count for count, *_ in self.batches[: len(self.batches) // 2]]  # by the first of two measurements


def linear(count: int) -> int:
    return 20 + 100 * count


@pytest.mark.parametrize(("total", "size"), [(220, 1), (310, 1), (350, 1), (500, 2), (900, 4), (1700, 8), (99999, 32)])
def test_on_a_gpu_it_is_what_was_measured(monkeypatch: pytest.MonkeyPatch, total: int, size: int) -> None:
    """Of 0.8 of the memory that the detector leaves: at 350 two images fit into all of it, but not into that."""
    assert Gpu(monkeypatch, total, linear).measured() == MeasuredBatch(size, linear(size))


@given(
    peaks=st.lists(st.integers(1, 1000), min_size=6, max_size=6).map(sorted),
    kept=st.integers(0, 100),
    total=st.integers(201, 4000),
    error=st.sampled_from(NO_MEMORY),
)
def test_however_memory_grows_a_batch_that_was_computed_is_chosen(
    peaks: list[int], kept: int, total: int, error: RuntimeError
) -> None:
    sizes = dict(zip((1, 2, 4, 8, 16, 32), peaks, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        gpu = Gpu(patch, total, sizes.__getitem__, kept=kept, error=error)
        if 100 + kept + peaks[0] > total:
            with pytest.raises(torch.cuda.OutOfMemoryError):
                gpu.measured()
            return
        found = gpu.measured()
    assert found.peak_bytes == sizes[found.size]
    budget = 0.8 * (total - 100 - kept)
    assert found.size == 1 or found.peak_bytes <= budget
    tried = gpu.tried()
    assert tried[:2] == [1, 1] and tried[-1] in (found.size, 2 * found.size)
    for count in tried[3:]:  # expected to fit
        assert 3 * sizes[count // 2] - 2 * sizes[count // 4] <= budget


def test_what_memory_grows_by_once_is_not_taken_for_what_each_image_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images need much more than one, and 32 hardly more than 8, as conv5 takes RoIs in chunks."""
    peaks = {1: 130, 2: 500, 4: 530, 8: 2020, 16: 2130, 32: 2370}
    assert Gpu(monkeypatch, 6500, peaks.__getitem__).measured() == MeasuredBatch(32, 2370)


def test_the_images_tried_on_a_gpu_are_the_largest_with_all_the_regions_there_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch, 1000, linear)
    gpu.measured()
    most = DetectionOptions(score_threshold=0.0, max_regions=36)
    assert {(shape, options) for _, shape, options in gpu.batches} == {((200, 250, 3), most)}
    assert gpu.tried() == [1, 1, 2, 4]  # and not 8, for which it is too small


def test_a_gpu_too_small_for_one_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Gpu(monkeypatch, 210, linear).measured()


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_another_batch_size_is_refused(text: str) -> None:
    arguments = ["extract-features", "--checkpoint", "x", "--images", "x", "--out", "x", "--instances", "x"]
    result = CliRunner().invoke(main, [*arguments, "--batch-size", text])
    assert result.exit_code == 2 and "an integer of 1 or more" in result.output


def test_a_feature_named_twice_is_written_once() -> None:
    assert ExtractOptions(features=("fc7", "pool5", "fc7")) == ExtractOptions(features=("fc7", "pool5"))
