"""`benchmarks/gpu`: the driver of the GPU check, its results and their record in docs/, and some steps on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_check_modules import GPU, ROOT, gpu_check_modules

STEPS = {
    "good": "step.put('value', 1); step.check('one', True); step.goal('speed', 2.0, 1.0)",
    "bad": "step.check('two', False); step.check('three', True)",
    "broken": "step.put('value', 1); raise ValueError('a bug in the step')",
    "hanging": "step.put('value', 1); import subprocess; subprocess.run('exec sleep 60 > $FIFO', shell=True)",
    "killed": "step.put('value', 1); import os; os.kill(os.getpid(), 9)",
    "absent": "step.put('skipped', 'no tool')",
    "late": "step.check('one', True); import atexit, os; atexit.register(os.abort)",
    "unused": "step.put('skipped', 'no tool'); import atexit, os; atexit.register(os._exit, 3)",
    "busy": "[step.put('numbers', list(range(n % 500))) for n in range(10**9)]",
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of benchmarks/gpu, by name."""
    with gpu_check_modules(monkeypatch) as modules:
        yield modules


@pytest.fixture
def steps(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the scripts in `STEPS`, which the driver runs instead of its own.

    The group of a step is the first letter of its name.
    """
    for name, code in STEPS.items():
        text = f"from results import run\ndef work(step):\n    {code}\nrun(work, '{name[0]}')\n"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(GPU))
    monkeypatch.setattr(gpu.check, "HERE", tmp_path)
    monkeypatch.setattr(gpu.check, "PLAN", tuple(gpu.check.StepPlan(name, name[0], 20) for name in STEPS))
    return tmp_path


def read(out: Path, group: str) -> dict[str, Any]:
    return json.loads((out / f"{group}.json").read_text())


def step_result(out: Path, name: str) -> dict[str, Any]:
    return read(out, name[0])[name]


def test_a_step_fails_if_a_check_fails_or_it_crashes(gpu: Any, steps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = steps / "out"
    names = ["good", "bad", "broken", "killed", "absent"]
    assert gpu.check.Check("cuda", out, names).run() == 1
    assert {name: step_result(out, name)["status"] for name in names} == {
        "good": "passed",
        "bad": "failed",
        "broken": "failed",
        "killed": "failed",
        "absent": "skipped",
    }
    assert step_result(out, "killed")["value"] == 1 and "status -9" in step_result(out, "killed")["error"]
    assert "a bug in the step" in step_result(out, "broken")["error"] and step_result(out, "broken")["value"] == 1
    printed = capsys.readouterr().out
    assert "FAILED: bad: two\n" in printed and "speed 2 (reached)" in printed and "no tool" in printed
    assert (out / "check.log").read_text() == printed
    assert gpu.check.Check("cuda", steps / "other", ["good", "absent"]).run() == 0


def test_a_step_that_crashes_while_python_exits_fails(
    gpu: Any, steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = steps / "out"
    assert gpu.check.Check("cuda", out, ["late", "unused", "bad"]).run() == 1
    assert [step_result(out, name)["status"] for name in ("late", "unused", "bad")] == ["failed"] * 3
    assert step_result(out, "late")["checks"] == [{"name": "one", "passed": True}]
    printed = capsys.readouterr().out
    assert "FAILED: late: it passed, but ended with status -6\n" in printed
    assert "FAILED: unused: it skipped, but ended with status 3\n" in printed and "FAILED: bad: two\n" in printed


def test_a_step_is_killed_with_its_subprocesses_at_its_time_limit(
    gpu: Any, steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.check, "PLAN", (gpu.check.StepPlan("hanging", "h", 1.5),))
    monkeypatch.setenv("FIFO", str(steps / "fifo"))
    os.mkfifo(steps / "fifo")
    reader = os.open(steps / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert gpu.check.Check("cuda", steps / "out", ["hanging"]).run() == 1
    for _ in range(100):
        try:
            assert os.read(reader, 1) == b""  # no process has the FIFO open for writing any more
            break
        except BlockingIOError:
            time.sleep(0.1)
    else:
        pytest.fail("the subprocess of the step is still running")
    os.close(reader)
    assert step_result(steps / "out", "hanging")["status"] == "timed out"
    assert "FAILED: hanging: timed out" in capsys.readouterr().out


def test_a_step_is_skipped_if_no_time_is_left(gpu: Any, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.check, "LATEST_START", -1.0)
    assert gpu.check.Check("cuda", steps / "out", ["good", "bad"]).run() == 0
    assert step_result(steps / "out", "bad") == {"status": "skipped", "skipped": "no time was left"}


def test_a_benchmark_step_waits_until_steps_in_the_background_have_ended(
    gpu: Any, steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, code in (("slow", "import time; time.sleep(1.5)"), ("timed", "pass")):
        (steps / f"{name}.py").write_text(f"from results import run\nrun(lambda step: exec({code!r}), '{name[0]}')\n")
    plan = gpu.check.StepPlan
    plans = (plan("slow", "s", 20, beside=True), plan("good", "g", 20), plan("timed", "t", 20, alone=True))
    monkeypatch.setattr(gpu.check, "PLAN", plans)
    assert gpu.check.Check("cuda", steps / "out", ["slow", "good", "timed"]).run() == 0
    lines = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines == ["slow", "good", "good: passed", "slow: passed", "timed", "timed: passed"]


def test_without_a_gpu_no_further_step_is_run(gpu: Any, steps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (steps / "good.py").write_text(
        "from results import run\ndef work(step):\n    step.put('gpu', False); step.check('a GPU', False)\n"
        "import sys; sys.argv[0] = 'env.py'\nrun(work, 'env')\n"
    )
    assert gpu.check.Check("cuda", steps / "out", ["good", "bad"]).run() == 1
    assert "bad" not in capsys.readouterr().out


def test_an_earlier_run_without_a_gpu_does_not_stop_a_run_of_some_steps(gpu: Any, steps: Path) -> None:
    (steps / "out").mkdir(exist_ok=True)
    (steps / "out" / "env.json").write_text(json.dumps({"env": {"status": "failed", "gpu": False}}))
    gpu.check.Check("cuda", steps / "out", ["good", "bad"]).run()
    assert step_result(steps / "out", "bad")["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_driver_ends_its_step_and_leaves_complete_results(
    gpu: Any, steps: Path, number: signal.Signals
) -> None:
    out = steps / "out"
    script = f"""
import sys; sys.path.insert(0, {str(GPU)!r})
import check; from pathlib import Path
check.HERE, check.PLAN = Path({str(steps)!r}), (check.StepPlan("good", "g", 20), check.StepPlan("busy", "b", 20))
run = check.Check("cuda", Path({str(out)!r}), ["good", "busy"]); run.watch(); sys.exit(run.run())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 30
    results = out / "b.json"
    while time.monotonic() < until and not (results.exists() and "numbers" in results.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(20) != 0
    for _ in range(50):  # the step ends with the driver: it stops writing
        written = results.stat().st_mtime_ns
        time.sleep(0.3)
        if results.stat().st_mtime_ns == written:
            break
    else:
        pytest.fail("the step goes on without its driver")
    assert step_result(out, "good")["value"] == 1
    numbers = step_result(out, "busy")["numbers"]
    assert numbers == list(range(len(numbers)))
    assert step_result(out, "busy")["status"] == ("stopped" if number == signal.SIGTERM else "running")


@pytest.mark.parametrize("module, name", [("results", "_plain"), ("check", "print")])
def test_a_signal_while_a_lock_is_held_stops_the_driver(gpu: Any, steps: Path, module: str, name: str) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(GPU)!r})
import check, os, results; from pathlib import Path
check.HERE, check.PLAN = Path({str(steps)!r}), (check.StepPlan("good", "g", 20),)
original = getattr({module}, {name!r}, print)
def stop(*arguments, **options):
    {module}.{name} = original
    os.kill(os.getpid(), 15)
run = check.Check("cuda", Path({str(steps / "out")!r}), ["good"]); run.watch()
{module}.{name} = stop
sys.exit(run.run())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "") and "FAILED: stopped by SIGTERM" in done.stdout


def test_a_run_removes_only_files_of_its_own(gpu: Any, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.check, "NAMES", list(STEPS))
    out = steps / "out"
    out.mkdir()
    for name in ("notes.json", "notes.json.gz", "x.json", "g.json", "trace.json.gz"):
        (out / name).write_text("{}")
    gpu.check.Check("cuda", out, list(STEPS), steps / "work")
    assert sorted(path.name for path in out.iterdir()) == ["check.log", "notes.json", "notes.json.gz", "x.json"]


def test_packing_removes_only_wheels(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old-1-py3-none-any.whl", "notes.txt"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(gpu.pack.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(sys, "argv", ["pack.py", "--out", str(tmp_path)])
    gpu.pack.main()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_steps_of_a_group_can_write_their_results_concurrently(gpu: Any, tmp_path: Path) -> None:
    code = """
        import sys; from pathlib import Path
        from results import write_step
        for n in range(50):
            write_step(Path(sys.argv[1]), "group", sys.argv[2], {"n": n, "odd": float("nan")})
    """
    environment = {**os.environ, "PYTHONPATH": str(GPU)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    for process in [subprocess.Popen([*command, name], env=environment) for name in ("a", "b")]:
        assert process.wait(30) == 0
    assert gpu.results.read_group(tmp_path, "group") == {name: {"n": 49, "odd": "nan"} for name in ("a", "b")}


RESULTS: dict[str, dict[str, Any]] = {
    "env": {"env": {"date": "2026-01-02", "device": "cuda", "card": "NVIDIA X", "product_tflops_bf16": 712.3}},
    "parity": {"runs": {"status": "failed", "checks": [{"name": "same", "passed": False, "value": 0.5, "limit": 0.1}]}},
    "extraction": {
        "extraction": {
            "status": "timed out",
            "refdet, bfloat16": {"images": 512, "images_per_second": 123.456, "regions_per_image": 99.5},
            "goals": [{"name": "images/s", "value": 123.456, "at_least": 300, "reached": False}],
        }
    },
}


def write_results(folder: Path, **changes: Any) -> None:
    folder.mkdir()
    for group, tree in (RESULTS | changes).items():
        (folder / f"{group}.json").write_text(json.dumps(tree))


def test_results_are_written_between_the_markers_of_the_page(gpu: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    write_results(tmp_path / "results")
    text = gpu.record.replace(page, gpu.record.rendered(tmp_path / "results"))
    for row in (
        "| refdet, bfloat16 | 512 | 123 | 99.5 |  |",
        "| images/s | 300 | 123 | no |",
        "| runs | failed |  | 0 of 1 checks, failed: same |",
        "| extraction | timed out |",
        "| same | 0.1 | 0.5 | **no** |",
        "| bfloat16 matrix products, TFLOP/s | 712 |",
    ):
        assert row in text
    assert gpu.record.replace(text, "nothing") == gpu.record.replace(page, "nothing")


def test_results_of_the_cpu_or_without_a_card_are_not_recorded(gpu: Any, tmp_path: Path) -> None:
    write_results(tmp_path / "a", env={"env": {"device": "cpu", "card": "none"}})
    with pytest.raises(SystemExit, match="rehearsal"):
        gpu.record.rendered(tmp_path / "a")
    write_results(tmp_path / "b", env={"env": {"device": "cuda"}})
    with pytest.raises(SystemExit, match="has no card"):
        gpu.record.rendered(tmp_path / "b")
    with pytest.raises(SystemExit, match="once each"):
        gpu.record.replace("no markers", "")


def test_a_checkout_without_an_installation_finds_the_commands(gpu: Any, tmp_path: Path) -> None:
    script = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    script += gpu.uninstalled.FINDER + "import refdet.cli.main; print(refdet.cli.main.__file__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "cli" / "main.py"), done.stderr


def test_requirements_are_packed_and_found_missing_or_too_old(gpu: Any) -> None:
    packed = [gpu.pack.name_of(line) for line in gpu.pack.requirements()]
    assert {"pycocotools", "msgspec", "click", "lmdb"} <= set(packed) and not gpu.pack.ASSUMED & set(packed)
    assert all(gpu.uninstalled.is_met(line) for line in gpu.pack.requirements())
    assert (
        not gpu.uninstalled.is_met("no-such-thing")
        and not gpu.uninstalled.is_met("click>=1000")
        and gpu.uninstalled.is_met("click>=8.2")
    )


@pytest.mark.slow
def test_every_step_can_be_imported(gpu: Any) -> None:
    for path in GPU.glob("*.py"):
        getattr(gpu, path.stem)


@pytest.mark.slow
def test_the_commit_is_unknown_without_git(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.env.commit() is None


@pytest.mark.slow
def test_steps_and_the_sanitizer_case_run_on_the_cpu(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`env` runs in a subprocess of the driver, the others in this process, which has already imported torch."""
    out, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, str(GPU / "check.py"), "--device", "cpu", "--out", str(out), "--work", str(work)]
    done = subprocess.run([*command, "--only", "env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, group in (("draw", "env"), ("network_parity", "parity")):
        step = gpu.results.Step(group, name, out, work, "cpu")
        getattr(gpu, name).work(step)
        assert not step.failed()
    env, parity = (read(out, group) for group in ("env", "parity"))
    assert env["env"]["status"] == "passed" and env["env"]["product_tflops_bf16"] > 0 and env["draw"]["images"] == 24
    assert len(parity["network_parity"]["checks"]) == 20
    extraction = gpu.results.Step("extraction", "extraction", out, work, "cpu")
    gpu.extraction.make_peer(extraction)
    assert {"pool5", "fc7"} <= set(extraction.values["difference_of_features_float32"])
    gpu.sanitizer_case.main("cpu")
    assert capsys.readouterr().out.endswith("every kernel ran\n")
