"""Defaults that depend on the device, tested without a GPU."""

import pytest
import torch

from refdet.extraction import defaults

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_batch_size_is_4_on_the_cpu_and_automatic_on_a_gpu() -> None:
    assert defaults.default_batch_size(CPU) == 4 and defaults.default_batch_size(GPU) is None


@pytest.mark.parametrize(("cores", "on_gpu"), [(1, 2), (2, 2), (4, 4), (8, 8), (64, 8)])
def test_the_number_of_workers_follows_from_the_cores_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, cores: int, on_gpu: int
) -> None:
    monkeypatch.setattr(defaults, "_count_cores", lambda: cores)
    assert defaults.default_workers(CPU) == 2 and defaults.default_workers(GPU) == on_gpu


@pytest.mark.parametrize(
    ("device", "precision", "capability", "hinted"),
    [
        (GPU, "float32", (9, 0), True),
        (GPU, "float32", (7, 5), False),  # no bfloat16
        (GPU, "bfloat16", (9, 0), False),
        (CPU, "float32", (9, 0), False),
    ],
)
def test_bfloat16_is_suggested_on_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, precision: str, capability: tuple[int, int], hinted: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    line = defaults.precision_hint(device, precision)
    assert (line is not None and "`precision='bfloat16'`" in line) == hinted
