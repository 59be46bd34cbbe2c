"""Step: versions, bandwidth of memory and disk, and throughput of matrix products."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable

import h5py
import numpy
import torch
import torchvision
from results import Step, run
from work import median, synchronize


def median_seconds(step: Step, work: Callable[[], object], rounds: int = 7) -> float:
    """Median seconds of some work, after a warm-up round."""
    times = []
    for turn in range(rounds + 1):
        synchronize(step)
        start = time.perf_counter()
        work()
        synchronize(step)
        if turn:
            times.append(time.perf_counter() - start)
    return median(times)


def work(step: Step) -> None:
    step.put("date", time.strftime("%Y-%m-%d"))
    step.put("device", step.device)
    step.put(
        "versions",
        {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "numpy": numpy.__version__,
            "h5py": h5py.__version__,
        },
    )
    step.put("commit", commit())
    step.put("cores", os.cpu_count())
    if not step.small:
        step.put("gpu", torch.cuda.is_available())
        step.check("a GPU is there", torch.cuda.is_available())
        if not torch.cuda.is_available():
            return
        properties = torch.cuda.get_device_properties(0)
        step.put("card", properties.name)
        step.put("gpu_memory_gib", properties.total_memory / 2**30)
        step.put("capability", f"{properties.major}.{properties.minor}")
    step.put("product_tflops_bf16", product_tflops(step, torch.bfloat16))
    torch.set_float32_matmul_precision("highest")
    step.put("product_tflops_float32", product_tflops(step, torch.float32))
    count = 1 << (20 if step.small else 30)
    source, target = (torch.empty(count, dtype=torch.uint8, device=step.device) for _ in range(2))
    source.random_(0, 256)
    step.put("copy_tb_per_s", 2 * count / median_seconds(step, lambda: target.copy_(source)) / 1e12)
    host = torch.empty(count // 4, dtype=torch.uint8, pin_memory=not step.small)
    on_device = source[: count // 4]
    step.put("to_host_gb_per_s", host.nbytes / median_seconds(step, lambda: host.copy_(on_device)) / 1e9)
    step.put("to_device_gb_per_s", host.nbytes / median_seconds(step, lambda: on_device.copy_(host)) / 1e9)
    disk(step)


def commit() -> str | None:
    """The commit of the checkout; None without git or outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def product_tflops(step: Step, dtype: torch.dtype) -> float:
    """Throughput of products of random square matrices in TFLOP/s."""
    side = 256 if step.small else 8192
    a, b = (torch.randn(side, side, device=step.device).to(dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(step, lambda: a @ b) / 1e12


def disk(step: Step) -> None:
    """Measure the write speed in the work folder, including fsync, and the free space."""
    data, path = os.urandom(1 << 20), step.work / "disk-test"
    count = 8 if step.small else 512
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(count):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    step.put("disk_write_mb_per_s", count * len(data) / (time.perf_counter() - start) / 1e6)
    path.unlink()
    step.put("disk_free_gib", shutil.disk_usage(step.work).free / 2**30)


if __name__ == "__main__":
    run(work, "env")
