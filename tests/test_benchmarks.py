"""What the benchmarks do besides measuring: reuse of files, exit codes, cleaning up, and results of long runs."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_modules import FOLDER, benchmark_module


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/learning.py, which imports another of that folder."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("learning")
    for name in ("learning", "torchvision_fpn"):
        sys.modules.pop(name, None)


def test_a_command_that_fails_is_not_measured() -> None:
    run = benchmark_module("build_split").run
    exits_with_1 = [sys.executable, "-c", "raise SystemExit(1)"]  # as refdet audit does if it finds leaks
    assert len(run(exits_with_1, 1)) == 3  # wall time, CPU time and memory
    with pytest.raises(SystemExit, match="exit code 1, 0 expected"):
        run(exits_with_1, 0)


def test_the_files_of_build_split_are_drawn_again_for_another_size(tmp_path: Path) -> None:
    prepare = benchmark_module("build_split").prepare
    source, _ = prepare(tmp_path, 60, 90)
    written = source.stat().st_mtime_ns
    assert prepare(tmp_path, 60, 90)[0].stat().st_mtime_ns == written  # the same size is not drawn again
    for size in ((40, 90), (40, 50)):
        tree = json.loads(prepare(tmp_path, *size)[0].read_text())
        assert (len(tree["images"]), len(tree["annotations"])) == size


def test_files_of_an_interrupted_run_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark_module("build_split")
    with monkeypatch.context() as patch:
        patch.setattr(module.pickle, "dumps", lambda *_, **__: 1 / 0)  # the refs are written last
        with pytest.raises(ZeroDivisionError):
            module.prepare(tmp_path, 60, 90)
    _, root = module.prepare(tmp_path, 60, 90)
    assert sorted(path.name for path in root.glob("*/refs*.p")) == ["refs(umd).p", "refs(unc).p", "refs(unc).p"]


def test_browse_refuses_a_folder_with_another_number_of_images(tmp_path: Path) -> None:
    module = benchmark_module("browse")
    module.prepare(tmp_path, 3)
    module.prepare(tmp_path, 3)  # reuses the folder
    with pytest.raises(SystemExit, match="holds 3 images, not 4"):
        module.prepare(tmp_path, 4)


def test_the_server_is_terminated_if_a_request_fails() -> None:
    server = benchmark_module("browse").server
    with pytest.raises(SystemExit), server([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        raise SystemExit("a request failed")
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_peak_memory_is_in_bytes_without_proc(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    module = benchmark_module("peak")
    monkeypatch.setattr(module, "Path", lambda path: Path("/no/such") / path.lstrip("/"))  # no /proc
    monkeypatch.setattr(module.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=1000))
    monkeypatch.setattr(module.sys, "platform", platform)
    assert module.peak_memory() == 1000 * unit


def test_a_training_run_that_fails_does_not_lose_the_others(learning: Any) -> None:
    futures: list[Future] = [Future() for _ in range(3)]
    futures[0].set_exception(ValueError("the first one"))
    futures[1].set_result({"key": "a"})
    futures[2].set_result({"key": "b"})
    rows = []
    with pytest.raises(ValueError, match="the first one"):
        for row in learning.results_as_completed(futures):
            rows.append(row["key"])
    assert sorted(rows) == ["a", "b"]


def test_rows_of_older_results_are_read(learning: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert learning.read_rows(path) == {}
    metrics = {kind: {"AP": 0.5, "AP75": 0.25} for kind in ("bbox", "segm")}
    row = {"key": "k", "side": "refdet", "changes": [], "seed": 0, **metrics}
    # the names of the two totals before they were renamed
    path.write_text(json.dumps({**row, "step_seconds": 12.0, "step_processor_seconds": 34.0}) + "\n")
    rows = list(learning.read_rows(path).values())
    assert rows == [{**row, "steps_wall_seconds": 12.0, "steps_cpu_seconds": 34.0}]
    (mean,) = learning.means(rows)
    assert (mean["steps_wall_seconds"], mean["steps_cpu_seconds"]) == (12.0, 34.0)
    assert " 34" in learning.table(rows)  # the CPU time
