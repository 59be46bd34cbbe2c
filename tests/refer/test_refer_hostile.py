"""Hundreds of broken and malicious files: each gives a one-line error or the right result, and runs no code."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from refer_examples import GREFS, INSTANCES, REFS, write
from refer_hostile_cases import CANARY, CASES, Case

from refdet.cli.main import main
from refer import REFER, ReferError, read_refs


@contextmanager
def no_hang(seconds: int = 20) -> Iterator[None]:
    """Raise TimeoutError if the block hangs: ``seconds`` are a thousand times what it needs. Only with SIGALRM."""

    def stop(*_: object) -> None:
        raise TimeoutError

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; fails if the test leaves a canary there, that is, if code from a file ran."""
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("posix", "system", 0xF0)  # which the opcodes EXT1, EXT2 and EXT4 of some cases ask for
    copyreg._extension_cache[0xF0] = os.system  # type: ignore[attr-defined]  # as after a first use of the extension
    try:
        yield tmp_path
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)
    assert not (tmp_path / CANARY).exists(), "code ran"


def can_read(read: Callable[[], Any], where: str, expected: str) -> bool:
    """Whether reading succeeds; if not, the error must be one short line that contains ``where`` and ``expected``."""
    try:
        read()
    except ReferError as error:
        message = str(error)
        assert where in message and "\n" not in message and len(message) < 600 and message.isprintable()
        assert expected in message
        return False
    return True


def test_there_are_enough_cases() -> None:
    assert len(CASES) > 400 and sum(case.good for case in CASES.values()) > 20


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_file_gives_an_error_or_the_right_refs(folder: Path, case: Case) -> None:
    root = write(folder / "root", case.refs, case.name, "data", case.protocol, case.instances)
    with no_hang():
        refs_good = can_read(lambda: read_refs(root, "data", "unc"), case.name, case.says)
        good = can_read(lambda: REFER(root, "data", "unc"), str(root), case.says)
        assert (refs_good, good) == (case.refs_good, case.good)
        if good and case.refs in (REFS, GREFS):
            assert list(REFER(root, "data", "unc")) == (GREFS if "grefs" in case.name else REFS)
        check_build_split(folder, root, refs_good)


def check_build_split(folder: Path, root: Path, refs_good: bool) -> None:
    """``refdet build-split`` with these refs removes the held-out images, or prints in one line why it cannot.

    It reads only the refs, not instances.json of the dataset.
    """
    source, out = folder / "source.json", folder / "split.json"
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 6, "width": 8} for i in range(1, 7)]
    source.write_text(json.dumps(INSTANCES | {"images": images}))
    arguments = ["build-split", "--instances", source, "--refer-root", root, "--out", out]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in done.output and "unexpected" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    refs = read_refs(root, "data", "unc") if refs_good else []
    held_out = {ref["image_id"] for ref in refs if ref["split"] != "train"}
    if held_out:
        assert done.exit_code == 0, done.output
        assert {image["id"] for image in json.loads(out.read_text())["images"]} == set(range(1, 7)) - held_out
    else:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert (done.exit_code, len(lines)) == (2, 1), done.output
        assert not out.exists()


# Cases whose command runs if the standard pickle module loads them.
EXPLOITS = {name: case for name, case in CASES.items() if name.startswith(("posix.system GLOBAL", "posix.system INST",
        "posix.system OBJ", "posix.system STACK_GLOBAL", "posix.system in protocol 0", "posix.system as a key",
        "posix.system behind", "EXT"))}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="the command is one of POSIX")
@pytest.mark.parametrize("case", EXPLOITS.values(), ids=EXPLOITS)
def test_exploits_run_code_in_an_unguarded_unpickler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.chdir(tmp_path)
    # what the EXT opcodes load
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.system)  # type: ignore[attr-defined]
    with suppress(pickle.UnpicklingError, TypeError):  # raised after the command has run
        pickle.loads(case.refs)
    assert (tmp_path / CANARY).exists()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    protocol=st.integers(0, 5),
    generalized=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 10**6),
)
def test_files_with_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, protocol: int, generalized: bool, changes: list, cut: int | None
) -> None:
    data = bytearray(json.dumps(GREFS).encode() if generalized else pickle.dumps(REFS, protocol))
    for at, byte in changes:
        data[at % len(data)] = byte
    data = data[: cut % len(data)] if cut is not None else data
    name = "grefs(unc).json" if generalized else "refs(unc).p"
    root = write(tmp_path_factory.mktemp("damaged"), bytes(data), name, "data")
    with no_hang():
        read = can_read(lambda: read_refs(root, "data", "unc"), name, "")
        assert not (read and cut is not None and not generalized)  # a cut pickle lacks its STOP opcode
        if can_read(lambda: REFER(root, "data", "unc"), str(root), ""):
            refer = REFER(root, "data", "unc")
            assert read and len(refer.to_dataframe()) == len([s for one in refer for s in one["sentences"]])


# "entry" is no field: it replaces the whole entry of the list.
FIELDS = [*REFS[0], *INSTANCES["annotations"][0], "sent", "height", "name", "entry"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 12) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)
FILES = {"refs": REFS, "grefs": GREFS, **INSTANCES}  # name -> list of entries
# name of the list, index of the entry (modulo the length of the list), field, new value
CHANGES = st.tuples(st.sampled_from([*FILES]), st.integers(0, 4), st.sampled_from(FIELDS), ANYTHING)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=st.lists(CHANGES, max_size=3))
def test_any_value_in_any_field(tmp_path_factory: pytest.TempPathFactory, changes: list) -> None:
    files = json.loads(json.dumps(FILES))
    for where, position, key, value in changes:
        if key == "entry":
            files[where][position % len(files[where])] = value
        elif isinstance(entry := files[where][position % len(files[where])], dict):
            entry[key] = value
    root = tmp_path_factory.mktemp("anything")
    for name, refs in (("refs(unc).p", files["refs"]), ("grefs(all).json", files["grefs"])):
        write(root, refs, name, "data", instances={key: files[key] for key in INSTANCES})
    with no_hang():
        for split_by in ("unc", "all"):
            if can_read(lambda by=split_by: REFER(root, "data", by), str(root), ""):  # type: ignore[misc]
                call_all_methods(REFER(root, "data", split_by), str(root))


def call_all_methods(refer: REFER, root: str) -> None:
    assert refer.getRefIds() == list(refer.Refs) and refer.getAnnIds() == list(refer.Anns)
    can_read(refer.to_dataframe, root, "")
    for one in refer:
        can_read(lambda: refer.getMask(one), root, "")  # noqa: B023  # called at once
        can_read(lambda: refer.getRefBox(one["ref_id"]), root, "")  # noqa: B023


def test_folders_pipes_and_link_loops_are_refused(folder: Path) -> None:
    root = write(folder / "root")
    instances = root / "refcoco" / "instances.json"
    instances.unlink()
    instances.mkdir()
    assert not can_read(lambda: REFER(root), "instances.json", "not a regular file")
    instances.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(instances)  # reading it would wait for a writer
        os.mkfifo(root / "refcoco" / "refs(google).p")
        with no_hang():
            assert not can_read(lambda: REFER(root), "instances.json", "not a regular file")
            assert not can_read(lambda: read_refs(root, "refcoco", "google"), "refcoco", "choose split_by unc")
    instances.unlink()
    instances.symlink_to(instances)
    assert not can_read(lambda: REFER(root), "instances.json", "")
