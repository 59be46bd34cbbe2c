"""Messages about the compiled kernels: the warning on a GPU without them, and the line of ``refdet --version``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner

from refdet.cli.main import main
from refdet.ops import _library
from refdet.ops._library import describe_kernels, warn_without_cuda_kernels

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
REBUILD = "REFDET_BUILD_CUDA=1 pip install --no-build-isolation . builds them"


@pytest.fixture(autouse=True)
def reset_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("REFDET_NO_EXT", raising=False)
    warn_without_cuda_kernels.cache_clear()
    yield
    warn_without_cuda_kernels.cache_clear()


def pretend_built(monkeypatch: pytest.MonkeyPatch, *devices: str, gpu: bool) -> None:
    """Set the devices that kernels were compiled for, and whether a GPU is visible."""
    monkeypatch.setattr(_library, "DEVICES", frozenset(devices))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize("devices", [(), ("cpu",)])
def test_a_gpu_without_kernels_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, devices: tuple[str, ...]
) -> None:
    pretend_built(monkeypatch, *devices, gpu=True)
    for device in (FIRST, CPU, FIRST, SECOND, FIRST):
        warn_without_cuda_kernels(device)
    first, second = (record.getMessage() for record in caplog.records)
    assert "no compiled kernels for cuda:0" in first and REBUILD in first and "cuda:1" in second


def test_no_warning_with_kernels_on_a_cpu_or_when_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_built(monkeypatch, "cpu", "cuda", gpu=True)
    warn_without_cuda_kernels(FIRST)
    pretend_built(monkeypatch, gpu=True)
    warn_without_cuda_kernels(CPU)
    monkeypatch.setenv("REFDET_NO_EXT", "1")
    warn_without_cuda_kernels(SECOND)
    assert not caplog.records


@pytest.mark.parametrize(
    ("devices", "gpu", "description"),
    [
        (("cpu", "cuda"), True, "kernels compiled for CPU and CUDA"),
        (("cpu",), False, "kernels compiled for the CPU only"),
        (("cpu",), True, f"kernels compiled for the CPU only (plain PyTorch on the GPU, slower; {REBUILD})"),
        (
            (),
            True,
            "kernels not compiled (plain PyTorch instead, slower; pip install --no-build-isolation . builds them)",
        ),
    ],
)
def test_version_describes_the_kernels(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], gpu: bool, description: str
) -> None:
    pretend_built(monkeypatch, *devices, gpu=gpu)
    monkeypatch.setattr("refdet.device.describe_device", lambda name: "a device")
    assert describe_kernels() == description
    assert CliRunner().invoke(main, ["--version"]).output.splitlines()[-1] == description
    monkeypatch.setenv("REFDET_NO_EXT", "1")
    assert describe_kernels() == "kernels switched off by REFDET_NO_EXT=1 (plain PyTorch instead, slower)"
