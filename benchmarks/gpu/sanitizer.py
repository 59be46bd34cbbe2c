"""Step: run every kernel on small inputs under compute-sanitizer's memcheck and racecheck."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from results import Step, run

TOOLS = {"memcheck": ["--leak-check", "no"], "racecheck": []}
CASE = Path(__file__).parent / "sanitizer_case.py"
LIMIT = 60  # seconds per tool
INSTALL_PATHS = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def work(step: Step) -> None:
    command = [sys.executable, str(CASE), step.device]
    sanitizer = shutil.which("compute-sanitizer") or next((path for path in INSTALL_PATHS if Path(path).exists()), None)
    if step.small or sanitizer is None:
        done = subprocess.run(command, capture_output=True, text=True)
        step.check("every kernel runs without compute-sanitizer", done.returncode == 0, stderr=done.stderr[-500:])
        step.put("skipped", "runs only on a GPU" if step.small else "compute-sanitizer was not found")
        return
    # separate allocations, so that memcheck sees reads past their ends
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    for tool, options in TOOLS.items():
        arguments = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *options]
        try:
            done = subprocess.run(
                [*arguments, *command], env=environment, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""  # bytes, in spite of text=True
            text = output.decode(errors="replace") if isinstance(output, bytes) else output
            step.put(f"{tool}_output", text[-3000:])
            step.check(f"{tool} ended within {LIMIT} s", False)
            continue
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", done.stdout)
        step.put(f"{tool}_summary", summary)
        clean = done.returncode == 0 and "every kernel ran" in done.stdout and bool(summary)
        step.check(f"{tool} finds nothing", clean, status=done.returncode)
        if not clean:
            step.put(f"{tool}_output", done.stdout[-6000:] + done.stderr[-2000:])


if __name__ == "__main__":
    run(work, "tests")
