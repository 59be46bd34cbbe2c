"""`refdet demo` with a tiny network: every command runs, and its outputs are complete."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import refdet.cli.demo_pipeline as demo_module
from refdet import store
from refdet.cli.demo_pipeline import demo
from refdet.cli.main import main
from refdet.errors import InputError, RuntimeFailure

pytestmark = pytest.mark.slow

STEPS = ["dataset", "build-split", "audit", "train", "evaluate", "extract-features", "listener", "evaluate-on-refer"]
COMMANDS = [step for step in STEPS if step not in ("dataset", "listener")]
# recipe changes
TINY = ("train.steps=8", "train.batch_size=2", "train.workers=0", "train.log_every=4", "model.width=8")


def run_nothing(args: list[str], output: Path | None = None) -> None:
    """In place of the function that runs a refdet command."""


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a finished demo, and the result of the `refdet demo` that made it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    set_options = [word for change in TINY for word in ("--set", change)]
    args = ["demo", "--out", str(out), "--seed", "3", "--images", "40", "--json", *set_options]
    return out, CliRunner().invoke(main, args, catch_exceptions=False)


def test_metrics_of_detection_and_of_every_refer_split_are_written(finished_demo: tuple[Path, Result]) -> None:
    out, result = finished_demo
    metrics = json.loads((out / "metrics.json").read_text())
    assert json.loads(result.stdout) == metrics  # nothing else is on stdout
    assert set(metrics) == {"detection", "refer", "provenance", "seconds", "seed", "versions"}
    assert set(metrics["detection"]) == {"bbox", "segm"}
    # None if the demo has no object of the metric's size
    assert all(rate is None or 0 <= rate <= 1 for rate in metrics["detection"]["bbox"].values())
    assert {name: set(splits) for name, splits in metrics["refer"].items()} == {
        "refcoco/unc": {"val", "testA", "testB"},
        "refcoco+/unc": {"val", "testA", "testB"},
        "refcocog/umd": {"val", "test"},
    }
    comprehension = {name: split["comprehension"] for name, split in metrics["refer"]["refcoco/unc"].items()}
    assert set(comprehension) == {"val", "testA", "testB"}
    assert all(
        0 <= rates["random_baseline@0.5"] <= 1 and 0 <= rates["accuracy@0.5"] <= 1 for rates in comprehension.values()
    )
    assert all("referent_recall" in split for splits in metrics["refer"].values() for split in splits.values())
    assert list(metrics["seconds"]) == [*STEPS, "total"]
    assert metrics["seconds"]["total"] == pytest.approx(sum(metrics["seconds"][step] for step in STEPS))
    assert metrics["seed"] == 3 and {"refdet", "torch"} <= set(metrics["versions"])


def test_metrics_hold_the_provenance_of_the_split(finished_demo: tuple[Path, Result]) -> None:
    out, _ = finished_demo
    written = json.loads((out / "split.json").read_text())["info"]["refdet"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["provenance"]["image_ids_sha256"] == written["image_ids_sha256"]
    assert "refcocog/umd/test" in metrics["provenance"]["excluded"]


def test_stores_of_the_evaluation_hold_no_training_image(finished_demo: tuple[Path, Result]) -> None:
    out, _ = finished_demo
    trained_on = {image["id"] for image in json.loads((out / "split.json").read_text())["images"]}
    for name in ("refcoco", "refcoco+", "refcocog"):
        with store.open(out / "features" / f"{name}.h5") as regions:
            assert len(regions) and not trained_on & set(regions)


def test_commands_are_printed_and_the_seed_is_used(finished_demo: tuple[Path, Result]) -> None:
    out, result = finished_demo
    for step in COMMANDS:
        assert f"$ refdet {step} " in result.stderr
    assert "examples/listener.py --train " in result.stderr
    # the audit of COCO's original split, which leaks
    assert "held-out images; make a clean file" in result.stderr and "as expected" in result.stderr
    seed = json.loads((out / "run" / "model.json").read_text())["recipe"]["train"]["seed"]
    assert seed == 3


def test_report_shows_every_command_and_that_nothing_leaked(finished_demo: tuple[Path, Result]) -> None:
    class TextParser(HTMLParser):
        text = ""

        def handle_data(self, data: str) -> None:
            self.text += data

    page = TextParser()
    page.feed((finished_demo[0] / "report.html").read_text(encoding="utf-8"))
    assert all(f"refdet {step} " in page.text for step in COMMANDS)
    assert "examples/listener.py --train " in page.text and "Comprehension with a listener" in page.text
    assert "Clean: 0 of " in page.text and "It has never seen the REFER images it is evaluated on" in page.text
    assert "Not of this detector" not in page.text  # the warning that the leak section is about another one


def test_an_existing_folder_is_an_error_and_left_unchanged(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert f"{tmp_path} exists; choose another --out or remove it" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--set", "train.stepz=8"), "train.steps"),  # the suggestion
        (("--images", "3"), "--images 3: too few"),
    ],
)
def test_invalid_arguments_are_reported_before_the_dataset_is_written(
    tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "out"), *args])
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_example_script_the_listener_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package has no examples/."""
    monkeypatch.setattr(demo_module, "LISTENER", tmp_path / "listener.py")
    messages: list[str] = []
    log = demo_module._CommandLog(run_nothing, messages.append)
    assert demo_module._run_listener(log, tmp_path, tmp_path, tmp_path, tmp_path) is None
    assert "skipped: listener.py" in messages[0] and not log.seconds


def test_a_failing_script_is_an_error_with_its_output(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit('no such thing')\n")
    messages: list[str] = []
    log = demo_module._CommandLog(run_nothing, messages.append)
    with pytest.raises(RuntimeFailure, match="script.py failed"), log.step("listener"):
        log.python("listener", script)
    assert "no such thing" in "".join(messages)


def test_the_demo_fails_if_the_audit_misses_the_leak_of_the_original_file(tmp_path: Path) -> None:
    """The commands here do nothing, so even the audit of COCO's original split, which leaks, finds no leak."""
    with pytest.raises(RuntimeFailure, match="audit found none"):
        demo(tmp_path / "out", run_nothing, lambda text: None, images=20)


def test_errors_of_commands_are_raised(tmp_path: Path) -> None:
    def fail(args: list[str], output: Path | None = None) -> None:
        raise InputError(f"{args[0]} failed")

    with pytest.raises(InputError, match="build-split failed"):
        demo(tmp_path / "out", fail, lambda text: None, images=20)
