"""Step: build the kernels in place for this GPU. A rehearsal (without a GPU) uses the existing ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from results import Step, run

ROOT = Path(__file__).resolve().parents[2]
# prints the devices that have kernels, such as "cpu,cuda"; for a new process, as this one may have loaded old kernels
PRINT_DEVICES = "import refdet.ops._library as l; print(','.join(sorted(l.DEVICES)))"


def capability() -> str:
    """The compute capability of the GPU, from nvidia-smi, as importing torch takes seconds; "9.0" if unknown."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        found = []
    return found[0] if found and found[0].replace(".", "").isdecimal() else "9.0"


def work(step: Step) -> None:
    if not step.small:  # not a rehearsal
        arch = os.environ.get("TORCH_CUDA_ARCH_LIST") or capability()
        environment = {
            **os.environ,
            "TORCH_CUDA_ARCH_LIST": arch,
            "MAX_JOBS": str(os.cpu_count()),
            "REFDET_REQUIRE_EXT": "1",
            "REFDET_BUILD_CUDA": "1",
        }
        step.put("arch", arch)
        start = time.monotonic()
        done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment)
        step.put("build_seconds", time.monotonic() - start)
        step.check("the extension builds", done.returncode == 0, status=done.returncode)
    found = subprocess.run([sys.executable, "-c", PRINT_DEVICES], cwd=ROOT, capture_output=True, text=True)
    devices = found.stdout.strip().split(",")
    step.put("kernels", devices)
    if not step.small:
        step.check("its CUDA kernels load", "cuda" in devices, stderr=found.stderr[-500:])


if __name__ == "__main__":
    run(work, group="env")  # its results are in env.json
