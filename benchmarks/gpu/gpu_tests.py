"""Step: run the tests marked ``gpu``. A rehearsal runs those of one file, which are skipped without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from counting_plugin import TARGET
from results import Step, run

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
MARK = re.compile(r"\bmark\.gpu\b")


def files_with_gpu_tests() -> list[Path]:
    """The test files that use the mark ``gpu``, directly or from a helper.

    pytest imports all files that it is given, and runs no test if an import fails: other files import packages that a
    GPU machine lacks. It also takes a third of the time to import only these.
    """
    helpers = [path.stem for path in (TESTS / "helpers").glob("*.py") if MARK.search(path.read_text())]
    imports = re.compile(rf"^(?:from|import) (?:{'|'.join(helpers)})\b", re.MULTILINE)
    texts = {path: path.read_text() for path in sorted(TESTS.rglob("test_*.py"))}
    return [path for path, text in texts.items() if MARK.search(text) or imports.search(text)]


def work(step: Step) -> None:
    counts = step.work / "counts.json"
    counts.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "counting_plugin", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark"]  # pytest-benchmark, if installed, warns about xdist
    command += ["-n", "2" if step.small else "8", "--dist", "load", "--tb=short", "-rf", "--maxfail=50"]
    files = [TESTS / "ops" / "test_nms.py"] if step.small else files_with_gpu_tests()
    command += [str(path.relative_to(ROOT)) for path in files]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, TARGET: str(counts), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.setdefault("OMP_NUM_THREADS", "1")  # by default each of the pytest workers would use all cores
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    seen = ""
    while process.poll() is None:
        time.sleep(0.5)
        seen = report_counts(step, counts, seen)
    report_counts(step, counts, seen)
    found = step.values.get("tests", {})
    step.check("pytest ran", process.returncode in (0, 1), status=process.returncode)
    step.check("no test failed", process.returncode == 0, failures=found.get("failures", [])[:20])
    if not step.small:
        step.check("tests ran", found.get("passed", 0) > 0)


def report_counts(step: Step, counts: Path, seen: str) -> str:
    """Report the counts so far if they have changed; returns the text of the file."""
    text = counts.read_text() if counts.exists() else seen
    if text != seen:
        step.put("tests", json.loads(text))
    return text


if __name__ == "__main__":
    run(work, "tests")
