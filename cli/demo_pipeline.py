"""Run the public commands on the synthetic dataset, from drawing the images to writing the report."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from refdet import __version__
from refdet.errors import InputError, RuntimeFailure
from refdet.files.atomic import write_json

DATASETS = (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))
# An installed package lacks the examples; the demo then skips the listener.
LISTENER = Path(__file__).resolve().parents[1] / "examples" / "listener.py"

DESCRIPTIONS = {
    "dataset": "Drew the images, annotations and sentences, in the layout of COCO 2014 and REFER.",
    "build-split": "Removed REFER's val and test images and their annotations from the training file.",
    "audit": "Checked for held-out images: the original file leaks, the split does not.",
    "train": "Trained a Mask R-CNN from scratch on the split.",
    "evaluate": "Computed COCO box and mask AP on the val images.",
    "extract-features": "Detected regions on REFER's val and test images and stored boxes, masks and features.",
    "listener": "Trained a small model, which takes words and stored features, on the train refs and ran it on the "
    "sentences of RefCOCO's val and test images.",
    "evaluate-on-refer": "Measured how many referred objects the regions cover, and how often the listener finds them.",
}


class RunCommand(Protocol):
    """Function that runs a refdet command line to completion, and raises what the command raises."""

    def __call__(self, args: list[str], output: Path | None = None) -> None:
        """Run ``refdet ARGS``, with standard output redirected to the file ``output`` if given."""


@dataclass
class _CommandLog:
    """Runs commands, and records them and their times by step.

    Attributes:
        run: runs a refdet command.
        say: shows a line to the user.
        commands: name of a step -> its command lines.
        seconds: name of a finished step -> its time.
    """

    run: RunCommand
    say: Callable[[str], None]
    commands: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block of commands as a step."""
        self.say(f"\n--- {name}")
        self.commands[name] = []
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.say(f"({name} took {self.seconds[name]:.1f} s)")

    def finished_steps(self) -> list[dict[str, Any]]:
        """The finished steps, for the report."""
        return [
            {"name": name, "about": DESCRIPTIONS[name], "commands": self.commands[name], "seconds": seconds}
            for name, seconds in self.seconds.items()
        ]

    def refdet(self, command: str, *args: str | Path, output: Path | None = None, step: str | None = None) -> None:
        """Print and run a refdet command of a step, by default the step with the command's name."""
        arguments = [command, *map(str, args)]
        line = shlex.join(["refdet", *arguments]) + (f" > {shlex.quote(str(output))}" if output else "")
        self.commands[step or command].append(line)
        self.say(f"$ {line}")
        self.run(arguments, output)

    def python(self, step: str, script: Path, *args: str | Path) -> None:
        """Print and run a Python script of a step; raises RuntimeFailure if it fails."""
        arguments = [str(script), *map(str, args)]
        line = shlex.join(["python", *arguments])
        self.commands[step].append(line)
        self.say(f"$ {line}")
        completed = subprocess.run(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.say(completed.stdout.rstrip())
        if completed.returncode:
            raise RuntimeFailure(f"{script} failed; see its output above")


def demo(
    out: Path,
    run: RunCommand,
    say: Callable[[str], None],
    seed: int = 0,
    images: int | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the pipeline into the new folder ``out``.

    Args:
        out: folder to create.
        run: runs a refdet command.
        say: shows a line to the user.
        seed: seed of the dataset and of the training.
        images: number of train images to draw, None for the default.
        changes: recipe changes, such as "train.steps=20".

    Returns:
        The contents of ``out/metrics.json``: detection, refer, provenance, seconds, seed, versions.

    Raises:
        InputError: ``out`` exists, or an argument is invalid.
        RuntimeFailure: a step failed.
    """
    from refdet.config import recipe

    recipe.load("demo").with_changes(changes)  # raises for invalid changes now instead of after minutes
    if out.exists():
        raise InputError(f"{out} exists; choose another --out or remove it")
    log = _CommandLog(run, say)
    data, split, model = out / "data", out / "split.json", out / "run"
    original = data / "annotations" / "instances_train2014.json"
    refer_root, train_images = data / "refer", data / "train2014"
    _draw_dataset(log, data, seed, images)
    with log.step("build-split"):
        log.refdet("build-split", *_flags(instances=original, refer_root=refer_root, out=split))
    with log.step("audit"):
        _expect_leak(log, original, refer_root)
        log.refdet("audit", *_flags(instances=split, refer_root=refer_root))
    with log.step("train"):
        settings = [word for change in (f"train.seed={seed}", *changes) for word in ("--set", change)]
        flags = _flags(recipe="demo", instances=split, images=train_images, out=model)
        log.refdet("train", *flags, *settings)
    with log.step("evaluate"):
        val, detected = data / "annotations" / "instances_val2014.json", out / "detection.json"
        flags = _flags(checkpoint=model, instances=val, images=data / "val2014")
        log.refdet("evaluate", *flags, "--json", output=detected)
    with log.step("extract-features"):
        for dataset, split_by in DATASETS:
            held_out = _held_out_splits(refer_root, dataset, split_by)
            flags = _flags(
                checkpoint=model,
                images=train_images,
                refer_root=refer_root,
                dataset=dataset,
                split_by=split_by,
                split=",".join(held_out),
                out=_store(out, dataset),
            )
            log.refdet("extract-features", *flags)
    answers = _run_listener(log, out, model, train_images, refer_root)
    with log.step("evaluate-on-refer"):
        for dataset, split_by in DATASETS:
            flags = _flags(store=_store(out, dataset), refer_root=refer_root, dataset=dataset, split_by=split_by)
            if answers is not None and dataset == DATASETS[0][0]:  # the listener answers the first dataset only
                flags += _flags(predictions=answers)
            log.refdet("evaluate-on-refer", *flags, *_flags(out=out / "refer" / dataset))
    folders = {name: out / "refer" / name for name, _ in DATASETS}
    metrics = _collect_metrics(log, detected, folders.values(), seed)
    write_json(out / "metrics.json", metrics)
    write_json(out / "steps.json", log.finished_steps())
    flags = _flags(run=model, refer_root=refer_root, images=train_images, trained_on=split, original_instances=original)
    for name, folder in folders.items():
        flags += _flags(store=_store(out, name), metrics=folder)
    if answers is not None:
        flags += _flags(predictions=answers)
    log.commands["report"] = []  # not timed: the report cannot show the time of writing itself
    log.refdet("report", *flags, *_flags(metrics=detected, steps=out / "steps.json", out=out / "report.html"))
    return metrics


def _draw_dataset(log: _CommandLog, data: Path, seed: int, images: int | None) -> None:
    """Draw the dataset into the folder ``data``; arguments as in `demo`."""
    from refdet.data import shapes

    with log.step("dataset"):
        call = f"shapes.write({str(data)!r}, seed={seed}, images={images})"
        log.commands["dataset"].append(f'python -c "from refdet.data import shapes; {call}"')
        log.say("drawing images and sentences, in the layout of COCO 2014 and REFER")
        shapes.write(data, seed, images)


def _collect_metrics(log: _CommandLog, detected: Path, folders: Iterable[Path], seed: int) -> dict[str, Any]:
    """Collect the contents of ``metrics.json``.

    Args:
        log: the commands so far.
        detected: JSON of ``evaluate``.
        folders: folders of ``evaluate-on-refer``, of each dataset.
        seed: seed of the dataset and of the training.
    """
    results = [_read(folder / "metrics.json") for folder in folders]
    return {
        "detection": _read(detected),
        "refer": {f"{result['dataset']}/{result['split_by']}": result["splits"] for result in results},
        "provenance": results[0]["provenance"],
        "seconds": {**log.seconds, "total": sum(log.seconds.values())},
        "seed": seed,
        "versions": {"refdet": __version__, "torch": version("torch"), "python": sys.version.split()[0]},
    }


def _run_listener(log: _CommandLog, out: Path, model: Path, images: Path, refer_root: Path) -> Path | None:
    """Train the listener and run it on the first of `DATASETS`.

    Returns:
        The JSON of its answers; None if the listener is not installed.
    """
    if not LISTENER.is_file():
        log.say(f"\n--- listener\nskipped: {LISTENER.name} comes with the source only")
        return None
    dataset, split_by = DATASETS[0]
    train, answers = out / "features" / f"{dataset}-train.h5", out / "listener.json"
    with log.step("listener"):
        flags = _flags(
            checkpoint=model,
            images=images,
            refer_root=refer_root,
            dataset=dataset,
            split_by=split_by,
            split="train",
            regions="annotations",
            out=train,
        )
        log.refdet("extract-features", *flags, step="listener")
        flags = _flags(train=train, test=_store(out, dataset), refer_root=refer_root)
        refs = [f"{name}/{by}" for name, by in DATASETS]
        log.python("listener", LISTENER, *flags, "--refs", *refs, *_flags(out=answers))
    return answers


def _expect_leak(log: _CommandLog, original: Path, refer_root: Path) -> None:
    """Audit the original instances file; RuntimeFailure unless the audit finds its leak."""
    try:
        log.refdet("audit", *_flags(instances=original, refer_root=refer_root))
    except RuntimeFailure as error:
        log.say(f"error: {error}\n(exit code 1, as expected: the original file contains val and test images)")
    else:
        raise RuntimeFailure(f"{original}: audit found none of the held-out images that are in it")


def _held_out_splits(refer_root: Path, dataset: str, split_by: str) -> list[str]:
    """Names of the splits other than train."""
    from refdet.data.refer_splits import choose_splits
    from refer import REFER

    refs = REFER(refer_root, dataset, split_by).data["refs"]
    return choose_splits(refs, (), str(refer_root / dataset), skip=("train",))


def _flags(**options: str | Path) -> list[str | Path]:
    """Arguments of a command line: ``--refer-root DIR`` for ``refer_root=DIR``."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def _store(out: Path, dataset: str) -> Path:
    return out / "features" / f"{dataset}.h5"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
