"""The step of the GPU check that runs the tests marked ``gpu``: which files, and that a GPU machine can import them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_check_modules import ROOT, gpu_check_modules


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of benchmarks/gpu, by name."""
    with gpu_check_modules(monkeypatch) as modules:
        yield modules


def test_pytest_gets_the_selected_files_and_a_thread_per_worker(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    started: list[tuple[list[str], dict[str, str]]] = []

    def popen(command: list[str], cwd: Path, env: dict[str, str]) -> Any:
        started.append((command, env))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(gpu.gpu_tests.subprocess, "Popen", popen)
    gpu.gpu_tests.work(gpu.results.Step("tests", "gpu_tests", tmp_path, tmp_path, "cuda"))
    ((command, environment),) = started
    assert "tests/ops/test_nms.py" in command and "tests/splits/test_benchmark.py" not in command
    assert environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_only_the_selected_files_have_gpu_tests(gpu: Any) -> None:
    selected = gpu.gpu_tests.files_with_gpu_tests()
    assert ROOT / "tests" / "ops" / "test_nms.py" in selected
    others = sorted({*(ROOT / "tests").rglob("test_*.py")} - {*selected})
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *others]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


NAME = re.compile(r"[A-Za-z0-9._-]+")  # of a distribution
MACHINE = {"pytest", "pytest-xdist", "hypothesis"}  # packages of a GPU machine, besides those that `pack` assumes
BLOCKER = """
import sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in BLOCKED:
            raise ModuleNotFoundError(f"a GPU machine has no {name}", name=name)
sys.meta_path.insert(0, Blocker)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def installed_closure(names: set[str]) -> set[str]:
    """The installed distributions among these names, and all that they require, by normalized name."""
    found: set[str] = set()
    while names:
        name = names.pop()
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        plain = (line for line in required if "extra ==" not in line)
        names |= {match[0].lower().replace("_", "-") for line in plain if (match := NAME.match(line))} - found
    return found


@pytest.mark.slow
def test_gpu_tests_import_only_what_a_gpu_machine_has(gpu: Any) -> None:
    """It has some packages with their requirements; those of `pack` come without theirs."""
    there = installed_closure(MACHINE | gpu.pack.ASSUMED) | {gpu.pack.name_of(line) for line in gpu.pack.requirements()}
    there.add("refdet")
    blocked = {
        module for module, distributions in metadata.packages_distributions().items()
        if not {name.lower().replace("_", "-") for name in distributions} & there
    }  # fmt: skip
    assert "pyarrow" in blocked or "ruff" in blocked
    files = gpu.gpu_tests.files_with_gpu_tests()
    script = f"BLOCKED = {blocked!r}{BLOCKER}"
    command = [sys.executable, "-c", script, "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
