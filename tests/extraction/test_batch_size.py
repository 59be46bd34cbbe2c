"""Automatic batch sizes, and splitting batches that run out of memory."""

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
OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.mark.parametrize("fits", [1, 2, 3, 7])
def test_a_batch_that_does_not_fit_is_split(fits: int) -> None:
    sizes = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        assert len(batch) == len(images)
        if len(batch) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return lambda: [record.id for record in batch]

    assert split_on_oom(compute)(RECORDS, IMAGES)() == list(range(7))
    assert max(sizes) <= fits
    if fits == 7:
        assert sizes == [7]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_single_image_that_does_not_fit_raises_out_of_memory(error: RuntimeError) -> None:
    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        raise error

    with pytest.raises(torch.cuda.OutOfMemoryError, match=re.escape(str(error))):
        split_on_oom(compute)(RECORDS, IMAGES)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_errors_of_libraries_split_a_batch_too(error: RuntimeError) -> None:
    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        if len(batch) > 2:
            raise error
        return lambda: [record.id for record in batch]

    assert split_on_oom(compute)(RECORDS, IMAGES)() == list(range(7))


@pytest.mark.parametrize(
    ("free", "out_of_memory"), [pytest.param(2**20, True, id="1 MiB free"), pytest.param(2**33, False, id="8 GiB free")]
)
@pytest.mark.parametrize("text", [
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "GET was unable to find an engine to execute this computation",
])  # fmt: skip
def test_an_ambiguous_library_error_is_out_of_memory_only_if_little_memory_is_free(
    monkeypatch: pytest.MonkeyPatch, text: str, free: int, out_of_memory: bool
) -> None:
    tried = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        tried.append(len(batch))
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**36))
    with pytest.raises(RuntimeError, match=re.escape(text)) as caught:
        split_on_oom(compute)(RECORDS, IMAGES)
    assert tried == ([7, 3, 1] if out_of_memory else [7])
    assert isinstance(caught.value, torch.cuda.OutOfMemoryError) == out_of_memory


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access was encountered", "shape mismatch", ""])
def test_other_errors_are_raised_unchanged(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tried = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        tried.append(len(batch))
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**36))
    with pytest.raises(RuntimeError) as caught:
        split_on_oom(compute)(RECORDS, IMAGES)
    assert tried == [7] and type(caught.value) is RuntimeError and str(caught.value) == text


def test_an_error_is_raised_unchanged_if_free_memory_cannot_be_queried(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[int, int]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_INTERNAL_ERROR") as caught, as_out_of_memory_error():
        raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
    assert type(caught.value) is RuntimeError


def test_a_batch_size_that_ran_out_of_memory_is_not_tried_again() -> None:
    tried = []

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Callable[[], list[int]]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return lambda: [record.id for record in batch]

    splitting = split_on_oom(compute)
    assert splitting(RECORDS, IMAGES)() == list(range(7))
    assert tried == [7, 3, 1, 2, 2, 2]
    tried.clear()
    assert splitting(RECORDS, IMAGES)() == list(range(7))
    assert tried == [1, 2, 2, 2]
    assert splitting(RECORDS[:2], IMAGES[:2])() == [0, 1]
    assert tried == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(("free_gib", "size"), [(0.1, 1), (2.6, 2), (3.9, 2), (5.1, 4), (500, 4)])
def test_on_the_cpu_the_batch_size_follows_from_free_memory(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, size: int
) -> None:
    """A power of 2 up to 4, whose images take 1 GiB each of 0.8 of the free memory."""
    monkeypatch.setattr(batch_size, "available_bytes", lambda: int(free_gib * 2**30))
    detector = SimpleNamespace(model=trained_model())
    assert auto_batch_size(detector, RECORDS, DetectionOptions(), ()) == size  # type: ignore[arg-type]


class FakeGpu:
    """The memory of a GPU, as PyTorch's functions report it, in bytes.

    Args:
        monkeypatch: replaces PyTorch's functions.
        total: memory of the GPU.
        needed: memory of a batch by its number of images.
        held: memory of the detector.
        kept: memory that libraries allocate in the first batch and keep.
        error: raised if memory is too small.

    Attributes:
        batches: number of images, shape of the first and options of each batch that was tried.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        total: int,
        needed: Callable[[int], int],
        held: int = 100,
        kept: int = 0,
        error: RuntimeError = OUT_OF_MEMORY[0],
    ) -> None:
        self.peak, self.allocated = 0, held
        self.batches = list[tuple[int, tuple[int, ...], DetectionOptions]]()

        def start_detecting(
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

        def reset_peak(device: torch.device) -> None:
            self.peak = self.allocated

        block = 8  # unused rest of the last block that PyTorch's allocator reserved for the detector
        monkeypatch.setattr(batch_size, "start_detecting", start_detecting)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset_peak)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.allocated + block)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (total - self.allocated - block, total))

    def measure(self) -> MeasuredBatch:
        """Measure the batch size, twice, by both functions that do."""
        parameters = [SimpleNamespace(device=torch.device("cuda"))]
        profiler = object()
        model = SimpleNamespace(parameters=lambda: iter(parameters), profiler=profiler)
        meta = SimpleNamespace(recipe=recipes.load("demo"), category_ids=IDS)
        detector = SimpleNamespace(model=model, meta=meta)
        options = DetectionOptions(score_threshold=0.5, max_regions=36)
        records = [ImageRecord(0, "", 100, 300), ImageRecord(1, "", 200, 250), ImageRecord(2, "", 10, 300)]
        found = measure_batch_size(detector, records, options, ())  # type: ignore[arg-type]
        assert auto_batch_size(detector, records, options, ()) == found.size  # type: ignore[arg-type]
        assert model.profiler is profiler
        return found

    def tried_sizes(self) -> list[int]:
        """Batch sizes that the first of the two measurements tried."""
        return [count for count, *_ in self.batches[: len(self.batches) // 2]]


def linear_memory(count: int) -> int:
    return 20 + 100 * count


@pytest.mark.parametrize(("total", "size"), [(220, 1), (310, 1), (350, 1), (500, 2), (900, 4), (1700, 8), (99999, 32)])
def test_on_a_gpu_the_batch_size_is_measured(monkeypatch: pytest.MonkeyPatch, total: int, size: int) -> None:
    """A batch may take 0.8 of the memory beside the detector's 100 bytes.

    Of a total of 350, that is 200, too little for the 220 of two images, which all of the 250 would hold.
    """
    assert FakeGpu(monkeypatch, total, linear_memory).measure() == MeasuredBatch(size, linear_memory(size))


@given(
    peaks=st.lists(st.integers(1, 1000), min_size=6, max_size=6).map(sorted),
    kept=st.integers(0, 100),
    total=st.integers(201, 4000),
    error=st.sampled_from(OUT_OF_MEMORY),
)
def test_the_chosen_batch_size_was_measured_and_fits_however_memory_grows(
    peaks: list[int], kept: int, total: int, error: RuntimeError
) -> None:
    sizes = dict(zip((1, 2, 4, 8, 16, 32), peaks, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        gpu = FakeGpu(patch, total, sizes.__getitem__, kept=kept, error=error)
        if 100 + kept + peaks[0] > total:
            with pytest.raises(torch.cuda.OutOfMemoryError):
                gpu.measure()
            return
        found = gpu.measure()
    assert found.peak_bytes == sizes[found.size]
    budget = 0.8 * (total - 100 - kept)
    assert found.size == 1 or found.peak_bytes <= budget
    tried = gpu.tried_sizes()
    assert tried[:2] == [1, 1] and tried[-1] in (found.size, 2 * found.size)
    # from 4 images up, a size is tried only if it fits by linear extrapolation from the two sizes before it
    for count in tried[3:]:
        assert 3 * sizes[count // 2] - 2 * sizes[count // 4] <= budget


def test_a_single_jump_in_memory_does_not_stop_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images need much more than one, and 32 hardly more than 8, as conv5 takes RoIs in chunks."""
    peaks = {1: 130, 2: 500, 4: 530, 8: 2020, 16: 2130, 32: 2370}
    assert FakeGpu(monkeypatch, 6500, peaks.__getitem__).measure() == MeasuredBatch(32, 2370)


def test_a_gpu_is_measured_with_the_largest_image_and_the_most_regions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, 1000, linear_memory)
    gpu.measure()
    every_region = DetectionOptions(score_threshold=0.0, max_regions=36)
    assert {(shape, options) for _, shape, options in gpu.batches} == {((200, 250, 3), every_region)}
    # of 0.8 * 900 = 720 bytes, 4 images take 420 and 8 are expected to take 820
    assert gpu.tried_sizes() == [1, 1, 2, 4]


def test_a_gpu_too_small_for_one_image_raises_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        FakeGpu(monkeypatch, 210, linear_memory).measure()


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_an_invalid_batch_size_is_refused(text: str) -> None:
    arguments = ["extract-features", "--checkpoint", "x", "--images", "x", "--out", "x", "--instances", "x"]
    result = CliRunner().invoke(main, [*arguments, "--batch-size", text])
    assert result.exit_code == 2 and "give an integer of 1 or more, or auto" in result.output


def test_a_feature_named_twice_is_written_once() -> None:
    assert ExtractOptions(features=("fc7", "pool5", "fc7")) == ExtractOptions(features=("fc7", "pool5"))
