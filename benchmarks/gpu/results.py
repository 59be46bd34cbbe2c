"""Results of a step of the GPU check: values, checks and goals, in the JSON file of its group.

The file is replaced atomically with each new result, so that a run that is cut off loses nothing. The steps of a group
share a file and may run concurrently.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

OUT, WORK, DEVICE = "REFDET_GPU_OUT", "REFDET_GPU_WORK", "REFDET_GPU_DEVICE"
UNFINISHED = ".unfinished"  # temporary file; a single name is enough, as the folder is locked while writing

Values = dict[str, Any]
Value = TypeVar("Value")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other steps that write into it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_group(folder: Path, group: str) -> dict[str, Values]:
    """Read the results of a group: step name -> values; empty if there are none yet."""
    path = folder / f"{group}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_step(folder: Path, group: str, step: str, values: Mapping[str, Any]) -> None:
    """Replace the values of a step in the file of its group."""
    with locked(folder):
        tree = read_group(folder, group) | {step: dict(values)}
        temporary = folder / UNFINISHED
        temporary.write_text(json.dumps(_plain(tree), indent=1) + "\n")
        temporary.replace(folder / f"{group}.json")


def _plain(value: Any) -> Any:
    """Convert a value for JSON; NaN and infinities, which JSON does not have, become strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _plain(value.item()) if hasattr(value, "item") else str(value)


@dataclass
class Step:
    """A running step.

    Attributes:
        group: its results file, without ".json".
        name: its key in that file.
        out: folder of the results.
        work: folder of drawn images, weights and outputs.
        device: "cuda" or "cpu"; the latter is a rehearsal with small sizes.
        values: the results so far.
    """

    group: str
    name: str
    out: Path
    work: Path
    device: str
    values: Values = field(default_factory=dict)

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def put(self, name: str, value: Any) -> None:
        """Add a value, and write the file."""
        self.values[name] = value
        self._write()
        if name != "status" and not isinstance(value, list | dict):
            self.say(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")

    def check(self, name: str, passed: bool, **details: Any) -> None:
        """Add a check; the step fails if any of its checks failed."""
        self.values.setdefault("checks", []).append({"name": name, "passed": bool(passed), **details})
        self._write()
        self.say(f"{'passed' if passed else 'FAILED'}: {name}{_listed(details)}")

    def attempt(self, name: str, work: Callable[..., Value], *arguments: Any, **options: Any) -> Value | None:
        """Run a part of the step; an exception becomes a failed check, so that the other parts still run."""
        try:
            return work(*arguments, **options)
        except Exception as error:
            traceback.print_exc()
            self.check(f"{name} ran to its end", False, error=f"{type(error).__name__}: {error}"[:500])
            return None

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Add a check that a value is at most a limit; NaN fails."""
        self.check(name, value <= limit, value=value, limit=limit)

    def goal(self, name: str, value: float, at_least: float) -> None:
        """Add a speed goal, which may be missed; not evaluated in a rehearsal."""
        reached = None if self.small else value >= at_least
        self.values.setdefault("goals", []).append(
            {"name": name, "value": value, "at_least": at_least, "reached": reached}
        )
        self._write()
        word = {True: "reached", False: "missed", None: "rehearsed"}[reached]
        self.say(f"goal {word}: {name}: {value:.4g} of {at_least:g}")

    def say(self, text: str) -> None:
        print(f"    {self.name}: {text}", flush=True)

    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [check["name"] for check in self.values.get("checks", []) if not check["passed"]]

    def _write(self) -> None:
        write_step(self.out, self.group, self.name, self.values)


def _listed(details: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in details.items()
    ]
    return f" ({', '.join(parts)})" if parts else ""


def run(work: Callable[[Step], None], group: str) -> None:
    """Main function of a step started by `check.py`: run it, and exit with 1 if a check failed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with check.py
    name = Path(sys.argv[0]).stem
    step = Step(group, name, Path(os.environ[OUT]), Path(os.environ[WORK]), os.environ[DEVICE])
    started = time.monotonic()
    step.put("status", "running")
    try:
        work(step)
    except BaseException as error:
        step.values["error"] = "".join(traceback.format_exception(error))[-4000:]
        step.check(f"{name} ran to its end", False, error=f"{type(error).__name__}: {error}"[:500])
        traceback.print_exc()
    step.put("seconds", time.monotonic() - started)
    step.put("status", "failed" if step.failed() else step.values.get("skipped") and "skipped" or "passed")
    sys.stdout.flush()
    sys.exit(1 if step.failed() else 0)
