"""Tests and benchmarks refdet on a GPU in at most nine minutes; started by `make gpu-check`.

    python benchmarks/gpu/check.py [--device cuda] [--out build/gpu-check] [--work DIR] [--only STEP ...]

Each step runs in its own process with a time limit and writes each result at once, so that a run that is cut off keeps
its results. Steps that would start too late are skipped. Exits 1 if a check failed, or a step crashed, timed out or was
stopped; a skipped step or a missed speed goal is reported but is not a failure. With ``--device cpu`` it is a
rehearsal: the same steps with small networks and images.

The output folder holds a JSON file for each group of steps, ``check.log``, and the trace of profile_gpu.py,
``trace.json.gz``.
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

import results
import uninstalled
from results import read_group, write_step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LATEST_START, END = 500.0, 535.0  # seconds after which no step starts, and at which running steps are killed
STOPPING = (signal.SIGTERM, signal.SIGINT)
MAX_LOG_CHARACTERS = 1 << 20  # of each step; its later lines are not logged


@dataclass(frozen=True)
class StepPlan:
    """A step and when to run it. By default, the next step starts when it has ended.

    Attributes:
        name: name of its module, without ".py".
        group: name of its results file, without ".json".
        limit: time limit in seconds.
        beside: start the next step at once; it may run until the next step that is ``alone``.
        alone: start it only when all earlier steps have ended.
    """

    name: str
    group: str
    limit: float
    beside: bool = False
    alone: bool = False


# Correctness first, then the most important measurements. Timed steps run alone. op_parity waits for the compiled ops.
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
BESIDE_BUILD = ("env", "draw")  # must not load the compiled ops, which "build" may be writing


class Log:
    """Prints lines and appends them to the log file; called from several threads."""

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
        """Log the output of the step. What exceeds the limit is read too, as the step would otherwise block."""
        left = MAX_LOG_CHARACTERS
        assert self._process.stdout is not None
        for line in self._process.stdout:
            left -= len(line)
            if left > 0:
                self._log(line.rstrip("\n"))

    def wait(self, seconds: float) -> int | None:
        """Wait at most this long, then kill what still runs; returns the exit status, None if it had not ended."""
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


class Stopped(BaseException):
    """Raised by a signal that stops the check. The argument is the name of the signal."""


class Check:
    """The run of all steps.

    Args:
        device: "cuda" or "cpu".
        out: folder of the results.
        names: the steps to run.
        work: folder of images, weights and outputs of the steps; emptied before a run of all steps. None for
            build/gpu-check-DEVICE.
    """

    def __init__(self, device: str, out: Path, names: Sequence[str], work: Path | None = None) -> None:
        self.device, self.out, self.names = device, out, names
        self.started = time.monotonic()
        self.ran: list[StepPlan] = []  # started or skipped
        self.running: list[Running] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / results.UNFINISHED).unlink(missing_ok=True)
        if set(names) == set(NAMES):
            for name in [*(f"{plan.group}.json" for plan in PLAN), "trace.json.gz", "check.log"]:
                (out / name).unlink(missing_ok=True)
        self.earlier_env = read_group(out, "env").get("env", {})  # of a run of all steps before one of some
        work = work or ROOT / "build" / f"gpu-check-{device}"
        if set(names) == set(NAMES):
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        self.log = Log(out / "check.log")
        if device == "cpu":
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.environment = uninstalled.environment() | {
            results.OUT: str(out.resolve()),
            results.WORK: str(work.resolve()),
            results.DEVICE: device,
        }

    def seconds(self) -> float:
        """Seconds since the start of the check."""
        return time.monotonic() - self.started

    def run(self) -> int:
        """Run the steps and print the summary; returns the exit status."""
        try:
            self._run_steps()
        except Stopped as stopped:
            self._end_all()
            return self.summary([f"stopped by {stopped}"])
        return self.summary()

    def _run_steps(self) -> None:
        self.log(f"gpu-check on {self.device}: {len(self.names)} steps, results in {self.out}")
        for plan in PLAN:
            if plan.name not in self.names:
                continue
            while plan.alone and self.running:
                self._finish(self.running[0])
            step = self._start(plan)
            if step is not None and not plan.beside:
                self._finish(step)
            env = read_group(self.out, "env").get("env", {})
            if self.device != "cpu" and env.get("gpu") is False and env != self.earlier_env:
                self.log("no GPU was found, so the other steps are not run; use DEVICE=cpu for a rehearsal on the CPU")
                break
        while self.running:
            self._finish(self.running[0])

    def watch(self) -> None:
        """Make Ctrl-C and SIGTERM end `run`: it kills the running steps and prints the summary."""
        for number in STOPPING:
            signal.signal(number, _stop)

    def _start(self, plan: StepPlan) -> Running | None:
        """Start a step, or record that it is skipped because it is too late, and return None."""
        if self.seconds() > LATEST_START:
            write_step(self.out, plan.group, plan.name, {"status": "skipped", "skipped": "no time was left"})
            self.ran.append(plan)
            self.log(f"[{self.seconds():4.0f} s] {plan.name}: skipped, no time left")
            return None
        self.log(f"[{self.seconds():4.0f} s] {plan.name}")
        write_step(self.out, plan.group, plan.name, {"status": "started"})
        without_ops = {"REFDET_NO_EXT": "1"} if "build" in self.names and plan.name in BESIDE_BUILD else {}
        step = Running(plan, self.environment | without_ops, self.log)
        self.ran.append(plan)
        self.running.append(step)
        return step

    def _finish(self, step: Running) -> None:
        """Wait for a step, and complete its results if it could not do so itself."""
        plan = step.plan
        limit = plan.limit * (2 if self.device == "cpu" else 1)  # a rehearsal may share the machine with other programs
        deadline = min(step.started + limit, self.started + END)
        status = step.wait(deadline - time.monotonic())
        self.running.remove(step)
        values = read_group(self.out, plan.group).get(plan.name, {})
        if status is None:
            values |= {"status": "timed out", "seconds": time.monotonic() - step.started}
        elif values.get("status") not in ("passed", "failed", "skipped"):
            values |= {"status": "failed", "error": values.get("error", f"it ended with status {status}")}
        elif status != 0 and values["status"] != "failed":  # such as a crash in a library's cleanup
            values |= {"status": "failed", "error": f"it {values['status']}, but ended with status {status}"}
        write_step(self.out, plan.group, plan.name, values)
        self.log(f"[{self.seconds():4.0f} s] {plan.name}: {values['status']}")

    def _end_all(self) -> None:
        for step in self.running:
            step.end()
            values = read_group(self.out, step.plan.group).get(step.plan.name, {})
            write_step(self.out, step.plan.group, step.plan.name, values | {"status": "stopped"})

    def summary(self, other_failures: Sequence[str] = ()) -> int:
        """Print the result of each step, the failed ones and other failures; returns the exit status."""
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
            notes += [f"{g['name']} {g['value']:.4g} ({'reached' if g['reached'] else 'missed'})" for g in goals
                      if g["reached"] is not None]  # fmt: skip
            seconds = values.get("seconds")
            shown = f"{seconds:8.1f}" if isinstance(seconds, float) else f"{'':8}"
            self.log(f"{plan.name:16}{shown}  {values.get('status', 'lost'):10} {', '.join(notes)}")
        failures += other_failures
        for failure in failures:
            self.log(f"FAILED: {failure}")
        self.log(f"{'failed' if failures else 'passed'} after {self.seconds():.0f} s; results in {self.out}")
        return 1 if failures else 0


def _stop(number: int, frame: FrameType | None) -> None:
    # Only raises: the interrupted code may hold the lock of the log or results, and cleanup here would wait forever.
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--work", type=Path, help="emptied before a run of all steps (default: build/gpu-check-DEVICE)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="STEP", help=", ".join(NAMES))
    options = parser.parse_args()
    uninstalled.prepare()
    check = Check(options.device, options.out, options.only, options.work)
    check.watch()
    sys.exit(check.run())


if __name__ == "__main__":
    main()
