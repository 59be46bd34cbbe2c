"""What an accident, or somebody else, has put into the files beside shards and weights: one line, and no hang."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted_extraction import BATCHES, RECORDS, compute
from resumable_extraction import load
from store_examples import HEADER, PLAN, contents

from refdet.cli.main import main
from refdet.config import recipe
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.errors import InputError, Interrupted, RefdetError
from refdet.extraction.pipeline import extract
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.report.inputs import read_log
from refdet.store.shard_file import ShardError, read
from refdet.structures.provenance import Provenance
from refdet.training.metrics_log import MetricsLog
from refdet.training.run_card import write_card

ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def run(out: Path, stop: bool = False, resume: bool = False) -> Summary:
    def stops(batch: list[Any], images: list[Any]) -> Finish:
        if stop and batch == BATCHES[2]:
            raise KeyboardInterrupt
        return compute(batch, images)

    return extract(out, PLAN, HEADER, BATCHES, RECORDS, load, stops, resume, shard_images=2)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of an extraction of which two shards are finished."""
    with pytest.raises(Interrupted):
        run(tmp_path / "a.h5", stop=True)
    return tmp_path / "a.h5.parts"


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**26)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


BAD: dict[str, Callable[[Path], object]] = {
    "a pipe": fifo,
    "a folder": folder,
    "too large": large,
    "empty": lambda path: path.write_text(""),
    "no JSON": lambda path: path.write_text("{"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "long numbers": lambda path: path.write_text('{"shards": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_plan_is_one_line(begun: Path, kind: str) -> None:
    BAD[kind](begun / "plan.json")
    with pytest.raises(InputError, match=r"plan.json: damaged \(.*\); remove .*a.h5.parts and start again"):
        run(begun.parent / "a.h5", resume=True)
    done = CliRunner().invoke(main, ["inspect", str(begun)])
    assert done.exit_code == 2 and done.output.startswith("error: ") and done.output.count("\n") == 1
    assert "unexpected" not in done.output and len(done.output) < 600


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(["options", "header", "batch_size", "shards", "images", "shards_sha256"]), ANY_JSON)
)
def test_a_plan_of_anything_is_refused_or_shown(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    out = tmp_path_factory.mktemp("plans") / "a.h5"
    with pytest.raises(Interrupted):
        run(out, stop=True)
    plan = out.with_name("a.h5.parts") / "plan.json"
    written = json.loads(plan.read_text())
    plan.write_text(json.dumps(written | changes))
    done = CliRunner().invoke(main, ["inspect", str(plan.parent)])
    assert done.exit_code in (0, 2) and "unexpected" not in done.output
    try:
        assert run(out, resume=True).images == 10 and {**written, "images": 0} == {**written, **changes, "images": 0}
    except RefdetError as error:
        assert error.exit_code == 2 and len(str(error)) < 600


@pytest.mark.parametrize("name", ["merged.json", "sessions.jsonl"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_notes_beside_the_shards_cost_nothing(begun: Path, name: str, kind: str) -> None:
    BAD[kind](begun / name)
    out = begun.parent / "a.h5"
    if kind == "a folder" and name == "merged.json":
        (begun / name).rmdir()
    assert run(out, resume=True).images == 10
    run(out.with_name("whole.h5"))
    assert contents(out) == contents(out.with_name("whole.h5"))


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_shard_that_is_no_file_is_named(begun: Path, kind: str) -> None:
    BAD[kind](begun / "000001.shard")
    with pytest.raises(InputError, match="000001.shard: not a file; remove it"):
        run(begun.parent / "a.h5", resume=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ANY_JSON, st.binary(max_size=30))
def test_a_shard_with_right_checksums_and_a_wrong_head(
    tmp_path_factory: pytest.TempPathFactory, head: Any, rest: bytes
) -> None:
    path = tmp_path_factory.mktemp("shards") / "000000.shard"
    text = json.dumps(head).encode()
    parts, crc = [b"refdet-shard/2\n"], 0
    for block in (json.dumps({"shard": 0}).encode(), len(text).to_bytes(4, "little") + text + rest):
        parts += [len(block).to_bytes(8, "little"), zlib.crc32(block).to_bytes(4, "little"), block]
        crc = zlib.crc32(zlib.crc32(block).to_bytes(4, "little"), crc)
    path.write_bytes(b"".join([*parts, bytes(8), crc.to_bytes(4, "little")]))
    with pytest.raises(ShardError, match="damaged: invalid image"):
        list(read(path, {"shard": 0}, PLAN))


GOOD = '{"step": 20, "loss": 2.5}\n'
LOGS: dict[str, tuple[str, str | int]] = {
    "two rows": (GOOD * 2, 2),
    "a last line that was cut": (GOOD + '{"step": 40, "lo', 1),
    "nothing": ("", 0),
    "a line that was cut before others": ('{"step": 1\n' + GOOD, "line 1 is not JSON"),
    "a list": (GOOD + "[1]\n" + GOOD, ", line 2: must be a JSON object"),
    "no loss": ('{"step": 1}\n', ", line 1: 'loss' is missing"),
    "text": ('{"step": 1, "loss": "x"}\n', ", line 1: 'loss' must be a number"),
    "NaN": ('{"step": 1, "loss": NaN}\n', "line 1 is not JSON"),
    "nested": ("[" * 100_000 + "\n" + GOOD, "line 1 is not JSON"),
}


@pytest.mark.parametrize("kind", LOGS)
def test_the_log_of_a_training(tmp_path: Path, kind: str) -> None:
    text, expected = LOGS[kind]
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    if isinstance(expected, int):
        assert len(read_log(path)) == expected
    else:
        with pytest.raises(InputError, match=rf"metrics.jsonl(: )?{expected}"):
            read_log(path)


def test_a_log_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="metrics.jsonl: not a regular file"):
        read_log(tmp_path / "metrics.jsonl")


def test_a_file_of_many_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    for line in (["inspect", path], ["audit", "--instances", path, "--refer-root", tmp_path]):
        done = CliRunner().invoke(main, list(map(str, line)))
        assert done.exit_code == 2 and done.output.count("\n") == 1, done.output


NO_LOGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (fifo, "not a regular file"),
    "a folder": (folder, "not a regular file"),
    "a link that leads nowhere yet": (lambda path: path.symlink_to(path.with_name("elsewhere")), "no such file"),
}


@pytest.mark.parametrize("kind", NO_LOGS)
def test_training_goes_on_with_no_log_but_a_file(tmp_path: Path, kind: str) -> None:
    make, says = NO_LOGS[kind]
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=f"metrics.jsonl: {says}"):
        MetricsLog(tmp_path, 3)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_card_that_is_no_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    BAD[kind](tmp_path / "README.md")
    write_card(
        tmp_path, CheckpointMetadata(recipe.load("demo"), ((1, "cat"),), Provenance.imported("drawn", "0" * 64), 3)
    )
    assert not (tmp_path / "README.md").is_file()


def test_times_are_not_written_through_a_link(begun: Path, tmp_path: Path) -> None:
    (begun / "sessions.jsonl").unlink()
    (begun / "sessions.jsonl").symlink_to(tmp_path / "elsewhere")
    assert run(begun.parent / "a.h5", resume=True).images == 10
    assert not (tmp_path / "elsewhere").exists()
