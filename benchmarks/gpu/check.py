"""Tests and benchmarks refdet on a GPU in at most nine minutes; started by `make gpu-check`.

    python benchmarks/gpu/check.py [--device cuda] [--out build/gpu-check] [--work DIR] [--only STEP ...]

Each step runs in its own process with a time limit and writes each result at once, so that a run that is cut off keeps
its results. Steps that would start too late are skipped. Exits 1 if a check failed; a missed speed goal is reported but
is not a failure. With ``--device cpu`` it is a rehearsal: the same steps with small networks and images.

The output folder holds a JSON file for each group of steps, ``check.log`` and ``trace.json.gz``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import bare
import results
from results import read_group, write_step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LATEST_START, END = 500.0, 535.0  # seconds after which no step starts, and at which all steps end
MAX_LOG_BYTES = 1 << 20  # bytes of a step in the log


@dataclass(frozen=True)
class StepPlan:
    """A step and when to run it.

    Attributes:
        name: name of its module, without ".py".
        group: name of its results file, without ".json".
        limit: time limit in seconds.
        beside: run it concurrently with the next step.
        alone: wait until all earlier steps have ended.
    """

    name: str
    group: str
    limit: float
    beside: bool = False
    alone: bool = False


# Correctness first, then the most important measurements. Timed steps run alone, the others concurrently.
PLAN = (
    StepPlan("build", "env", 180, beside=True),
    StepPlan("env", "env", 40),
    StepPlan("draw", "env", 60),
    StepPlan("op_parity", "tests", 60, alone=True),
    StepPlan("sanitizer", "tests", 130, beside=True),
    StepPlan("gpu_tests", "tests", 170, beside=True),
    StepPlan("network_parity", "parity", 130, beside=True),
    StepPlan("runs", "parity", 150),
    StepPlan("kernels", "ops", 45, alone=True),
    StepPlan("profile_gpu", "extraction", 60, alone=True),
    StepPlan("extraction", "extraction", 140, alone=True),
    StepPlan("training", "training", 90, alone=True),
    StepPlan("torchrun", "training", 95, alone=True),
)
NAMES = [plan.name for plan in PLAN]
BESIDE_BUILD = ("env", "draw")  # must not load a library that is being written


class Log:
    """Prints lines and appends them to the log."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            self._file.write(line + "\n")
            self._file.flush()


class Running:
    """A running step: its process and the processes that it started."""

    def __init__(self, plan: StepPlan, environment: dict[str, str], log: Log) -> None:
        self.plan, self._log, self.started = plan, log, time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(HERE / f"{plan.name}.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        left = MAX_LOG_BYTES
        assert self._process.stdout is not None
        for line in self._process.stdout:
            left -= len(line)
            if left > 0:
                self._log(line.rstrip("\n"))

    def wait(self, seconds: float) -> int | None:
        """Wait for the exit status, or None after the time limit; kills the step's remaining processes."""
        try:
            return self._process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        """Kill the step and all processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(1)


class Check:
    """The run of all steps.

    Args:
        device: "cuda" or "cpu".
        out: folder of the results.
        names: the steps to run.
        work: folder of images, weights and outputs of the steps; emptied before a run of all steps.
    """

    def __init__(self, device: str, out: Path, names: Sequence[str], work: Path | None = None) -> None:
        self.device, self.out, self.names = device, out, names
        self.started = time.monotonic()
        self.ran: list[StepPlan] = []
        self.running: list[Running] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / results.UNFINISHED).unlink(missing_ok=True)
        if set(names) == set(NAMES):
            for name in [*(f"{plan.group}.json" for plan in PLAN), "trace.json.gz", "check.log"]:
                (out / name).unlink(missing_ok=True)
        work = work or ROOT / "build" / f"gpu-check-{device}"
        if set(names) == set(NAMES):
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        self.log = Log(out / "check.log")
        if device == "cpu":
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.environment = bare.environment() | {
            results.OUT: str(out.resolve()),
            results.WORK: str(work.resolve()),
            results.DEVICE: device,
        }

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def run(self) -> int:
        """Run the steps; returns the exit status."""
        self.log(f"gpu-check on {self.device}: {len(self.names)} steps, results in {self.out}")
        for plan in PLAN:
            if plan.name not in self.names:
                continue
            while plan.alone and self.running:
                self._finish(self.running[0])
            begun = self._start(plan)
            if begun is not None and not plan.beside:
                self._finish(begun)
            if self.device != "cpu" and read_group(self.out, "env").get("env", {}).get("gpu") is False:
                self.log("no GPU was found, so the other steps are not run; use DEVICE=cpu for a rehearsal on the CPU")
                break
        while self.running:
            self._finish(self.running[0])
        return self.summary()

    def watch(self) -> None:
        """Make Ctrl-C and SIGTERM kill the running steps and print the summary."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stopped)

    def _start(self, plan: StepPlan) -> Running | None:
        if self.seconds() > LATEST_START:
            write_step(self.out, plan.group, plan.name, {"status": "skipped", "skipped": "no time was left"})
            self.ran.append(plan)
            self.log(f"[{self.seconds():4.0f} s] {plan.name}: skipped, no time left")
            return None
        self.log(f"[{self.seconds():4.0f} s] {plan.name}")
        write_step(self.out, plan.group, plan.name, {"status": "started"})
        beside = {"REFDET_NO_EXT": "1"} if "build" in self.names and plan.name in BESIDE_BUILD else {}
        begun = Running(plan, self.environment | beside, self.log)
        self.ran.append(plan)
        self.running.append(begun)
        return begun

    def _finish(self, begun: Running) -> None:
        plan = begun.plan
        limit = plan.limit * (2 if self.device == "cpu" else 1)  # a rehearsal may share the machine with other programs
        until = min(begun.started + limit, self.started + END)
        status = begun.wait(until - time.monotonic())
        self.running.remove(begun)
        values = read_group(self.out, plan.group).get(plan.name, {})
        if status is None:
            values |= {"status": "timed out", "seconds": time.monotonic() - begun.started}
        elif values.get("status") not in ("passed", "failed", "skipped"):
            values |= {"status": "failed", "error": values.get("error", f"it ended with status {status}")}
        write_step(self.out, plan.group, plan.name, values)
        self.log(f"[{self.seconds():4.0f} s] {plan.name}: {values['status']}")

    def _stopped(self, number: int, frame: FrameType | None) -> None:
        for begun in self.running:
            begun.end()
            values = read_group(self.out, begun.plan.group).get(begun.plan.name, {})
            write_step(self.out, begun.plan.group, begun.plan.name, values | {"status": "stopped"})
        self.log(f"stopped by {signal.Signals(number).name}")
        self.summary()
        os._exit(1)

    def summary(self) -> int:
        """Print the result of each step and the failures; returns the exit status."""
        failures = []
        self.log(f"\n{'step':16}{'seconds':>8}  {'result':10} notes")
        for plan in self.ran:
            values = read_group(self.out, plan.group).get(plan.name, {})
            checks = values.get("checks", [])
            failed = [check["name"] for check in checks if not check["passed"]]
            if values.get("status") not in ("passed", "skipped"):
                failures.append(f"{plan.name}: {'; '.join(failed) or values.get('error', values.get('status'))}")
            goals = values.get("goals", [])
            notes = [values["skipped"]] if "skipped" in values else []
            notes += [f"{len(checks) - len(failed)} of {len(checks)} checks passed"] if checks else []
            notes += [f"{g['name']} {g['value']:.4g} ({'goal' if g['reached'] else 'missed'})" for g in goals
                      if g["reached"] is not None]  # fmt: skip
            seconds = values.get("seconds")
            shown = f"{seconds:8.1f}" if isinstance(seconds, float) else f"{'':8}"
            self.log(f"{plan.name:16}{shown}  {values.get('status', 'lost'):10} {', '.join(notes)}")
        for failure in failures:
            self.log(f"FAILED: {failure}")
        self.log(f"{'failed' if failures else 'passed'} after {self.seconds():.0f} s; results in {self.out}")
        return 1 if failures else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--work", type=Path, help="emptied before a run of all steps (default: build/gpu-check-DEVICE)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="STEP", help=", ".join(NAMES))
    options = parser.parse_args()
    bare.prepare()
    check = Check(options.device, options.out, options.only, options.work)
    check.watch()
    sys.exit(check.run())


if __name__ == "__main__":
    main()
