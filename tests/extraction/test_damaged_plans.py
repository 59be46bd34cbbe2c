"""Damaged or malicious files beside shards and weights give an error of one line, and nothing waits forever."""

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
from interrupted_extraction import BATCHES, RECORDS, compute, interrupt_at
from resumable_extraction import load
from store_examples import HEADER, PLAN, contents

from refdet.cli.main import main
from refdet.config import recipe
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.errors import InputError, Interrupted, RefdetError
from refdet.extraction.pipeline import extract
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
    """Extract; with ``stop``, Ctrl-C interrupts the third of four batches."""
    computing = interrupt_at(BATCHES[2]) if stop else compute
    return extract(out, PLAN, HEADER, BATCHES, RECORDS, load, computing, resume, shard_images=2)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The folder of an unfinished extraction, with two shards."""
    with pytest.raises(Interrupted):
        run(tmp_path / "a.h5", stop=True)
    return tmp_path / "a.h5.parts"


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**26)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a pipe": make_pipe,
    "a folder": make_folder,
    "too large": make_large,
    "empty": lambda path: path.write_text(""),
    "not JSON": lambda path: path.write_text("{"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "long numbers": lambda path: path.write_text('{"shards": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_reported_in_one_line(unfinished: Path, kind: str) -> None:
    DAMAGE[kind](unfinished / "plan.json")
    with pytest.raises(InputError, match=r"plan\.json: damaged \(.*\); remove .*a\.h5\.parts and start again"):
        run(unfinished.parent / "a.h5", resume=True)
    done = CliRunner().invoke(main, ["inspect", str(unfinished)])
    assert done.exit_code == 2 and done.output.startswith("error: ") and done.output.count("\n") == 1
    assert "unexpected" not in done.output and len(done.output) < 600


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(["options", "header", "batch_size", "shards", "images", "shards_sha256"]), ANY_JSON)
)
def test_any_json_in_a_plan_is_refused_or_shown(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    out = tmp_path_factory.mktemp("plans") / "a.h5"
    with pytest.raises(Interrupted):
        run(out, stop=True)
    plan = out.with_name("a.h5.parts") / "plan.json"
    valid = json.loads(plan.read_text())
    plan.write_text(json.dumps(valid | changes))
    done = CliRunner().invoke(main, ["inspect", str(plan.parent)])
    assert done.exit_code in (0, 2) and "unexpected" not in done.output
    try:
        resumed = run(out, resume=True)
    except RefdetError as error:
        assert error.exit_code == 2 and len(str(error)) < 600
    else:  # only "images" may change, which resuming does not read
        assert resumed.images == 10 and {**valid, "images": 0} == {**valid, **changes, "images": 0}


@pytest.mark.parametrize("name", ["merged.json", "sessions.jsonl"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_beside_the_shards_do_not_stop_resuming(unfinished: Path, name: str, kind: str) -> None:
    DAMAGE[kind](unfinished / name)
    out = unfinished.parent / "a.h5"
    if kind == "a folder" and name == "merged.json":  # the merge must write it
        with pytest.raises(IsADirectoryError) as caught:
            run(out, resume=True)
        assert caught.value.filename == str(unfinished / name) and not out.exists()
        (unfinished / name).rmdir()
    assert run(out, resume=True).images == 10
    run(out.with_name("whole.h5"))
    assert contents(out) == contents(out.with_name("whole.h5"))


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_shard_that_is_not_a_file_is_named(unfinished: Path, kind: str) -> None:
    DAMAGE[kind](unfinished / "000001.shard")
    with pytest.raises(InputError, match="000001.shard: not a file; remove it"):
        run(unfinished.parent / "a.h5", resume=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ANY_JSON, st.binary(max_size=30))
def test_a_shard_with_valid_checksums_and_an_invalid_header_is_refused(
    tmp_path_factory: pytest.TempPathFactory, head: Any, rest: bytes
) -> None:
    path = tmp_path_factory.mktemp("shards") / "000000.shard"
    header = json.dumps(head).encode()
    parts, crc = [b"refdet-shard/2\n"], 0
    for block in (json.dumps({"shard": 0}).encode(), len(header).to_bytes(4, "little") + header + rest):
        parts += [len(block).to_bytes(8, "little"), zlib.crc32(block).to_bytes(4, "little"), block]
        crc = zlib.crc32(zlib.crc32(block).to_bytes(4, "little"), crc)
    path.write_bytes(b"".join([*parts, bytes(8), crc.to_bytes(4, "little")]))
    with pytest.raises(ShardError, match="damaged: invalid image"):
        list(read(path, {"shard": 0}, PLAN))


ROW = '{"step": 20, "loss": 2.5}\n'
# contents of metrics.jsonl, and the number of rows read or the error
LOGS: dict[str, tuple[str, str | int]] = {
    "two rows": (ROW * 2, 2),
    "truncated last line": (ROW + '{"step": 40, "lo', 1),
    "empty": ("", 0),
    "truncated first line": ('{"step": 1\n' + ROW, "line 1 is not JSON"),
    "a list": (ROW + "[1]\n" + ROW, ", line 2: must be a JSON object"),
    "no loss": ('{"step": 1}\n', ", line 1: 'loss' is missing"),
    "text": ('{"step": 1, "loss": "x"}\n', ", line 1: 'loss' must be a number"),
    "NaN": ('{"step": 1, "loss": NaN}\n', "line 1 is not JSON"),
    "nested": ("[" * 100_000 + "\n" + ROW, "line 1 is not JSON"),
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_training_log_is_read_or_refused_with_its_line(tmp_path: Path, kind: str) -> None:
    text, expected = LOGS[kind]
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    if isinstance(expected, int):
        assert len(read_log(path)) == expected
    else:
        with pytest.raises(InputError, match=rf"metrics.jsonl(: )?{expected}"):
            read_log(path)


def test_a_training_log_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="metrics.jsonl: not a regular file"):
        read_log(tmp_path / "metrics.jsonl")


def test_an_input_file_of_8_gib_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    for line in (["inspect", path], ["audit", "--instances", path, "--refer-root", tmp_path]):
        done = CliRunner().invoke(main, list(map(str, line)))
        assert done.exit_code == 2 and done.output.count("\n") == 1, done.output


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (make_pipe, "not a regular file"),
    "a folder": (make_folder, "not a regular file"),
    "a dangling link": (lambda path: path.symlink_to(path.with_name("elsewhere")), "no such file"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_training_refuses_a_log_that_is_not_a_file(tmp_path: Path, kind: str) -> None:
    make, message = NOT_FILES[kind]
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=f"metrics.jsonl: {message}"):
        MetricsLog(tmp_path, 3)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_run_card_that_is_not_a_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    DAMAGE[kind](tmp_path / "README.md")
    provenance = Provenance.imported("weights.pth", "0" * 64)
    write_card(tmp_path, CheckpointMetadata(recipe.load("demo"), ((1, "cat"),), provenance, 3))
    assert not (tmp_path / "README.md").is_file()


def test_the_session_log_is_not_written_through_a_link(unfinished: Path, tmp_path: Path) -> None:
    (unfinished / "sessions.jsonl").unlink()
    (unfinished / "sessions.jsonl").symlink_to(tmp_path / "elsewhere")
    assert run(unfinished.parent / "a.h5", resume=True).images == 10
    assert not (tmp_path / "elsewhere").exists()
