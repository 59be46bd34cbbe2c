import errno
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from refdet.errors import RuntimeFailure
from refdet.files import atomic
from refdet.files.atomic import TEMPORARY_MARK, atomic_write, find_temporary_files, write_json, write_json_once


def test_the_file_appears_when_it_is_done(tmp_path: Path) -> None:
    target = tmp_path / "new" / "values.npz"
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".npz"
        temporary.write_text("text")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["values.npz"]
    assert target.read_text() == "text"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "values.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["values.txt"]
    assert target.read_text() == "old"


def test_errors_name_the_file_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "values.txt"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(target):
        pass  # nothing was written
    assert caught.value.filename == str(target)


def test_removing_the_temporary_file_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(ValueError, match="the error itself"), atomic_write(tmp_path / "a.json"):
        raise ValueError("the error itself")


def test_a_name_that_is_too_long_is_in_the_error(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 260 + ".json")
    with pytest.raises(OSError, match="name too long") as caught, atomic_write(target) as temporary:
        temporary.write_text("text")
        pytest.fail("the work was done in vain")
    assert caught.value.filename == str(target)


LONG = ["n" * 250 + ".json", "n" * 245 + ".json", "ü" * 125 + ".json", "n" * 255, "n." + "s" * 250, "n" * 221 + ".json"]


@pytest.mark.parametrize("name", LONG)
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    others = [other for other in LONG if other != name]
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("text")
        assert find_temporary_files(tmp_path, name) == [temporary]
        assert not any(find_temporary_files(tmp_path, other) for other in others)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": [1.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"z": 1, "a": [1.5, None]}
    assert text.index("z") < text.index("a") and text.endswith("}\n")


def test_what_is_no_json_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.h5", "a", "a.tar.gz", ".hidden", "ümlaut [1].h5", "a.h5.parts", "x.refdet-tmp.h5"])
def test_only_our_own_temporary_files_are_found(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    stem, suffix = target.stem, target.suffix
    others = [f".{stem}.original{suffix}", f".{stem}.0123abcd{suffix}", f".{name}.notes",
              f".{stem}.0123abcX.{TEMPORARY_MARK}{suffix}", f"{stem}.0123abcd{TEMPORARY_MARK}{suffix}"]  # fmt: skip
    for other in others:
        (tmp_path / other).write_text("mine")
    with atomic_write(target) as temporary, atomic_write(tmp_path / "b.h5") as second:
        temporary.write_text("")
        second.write_text("")
        assert find_temporary_files(tmp_path, name) == [temporary]
        assert set(find_temporary_files(tmp_path)) == {temporary, second}
    assert find_temporary_files(tmp_path) == [] and find_temporary_files(tmp_path / "no") == []


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)


def only_the_first_writes_once(target: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda part: write_json_once(target, {"part": part}), range(8)))
    assert wrote.count(True) == 1 and json.loads(target.read_text()) == {"part": wrote.index(True)}
    assert not write_json_once(target, {"part": 9}) and json.loads(target.read_text())["part"] != 9
    assert list(target.parent.iterdir()) == [target]


def test_only_the_first_writes_once(tmp_path: Path) -> None:
    only_the_first_writes_once(tmp_path / "merging.json")


def test_only_the_first_writes_once_without_hard_links(tmp_path: Path, no_links: None) -> None:
    only_the_first_writes_once(tmp_path / "merging.json")


def test_without_hard_links_the_file_is_there_for_the_second(
    tmp_path: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename, wrote = tmp_path / "plan.json", os.replace, []

    def while_another_waits(source: Path, destination: Path) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: rename(source, destination))  # the first goes on
        wrote.append(write_json_once(target, {"part": 2}))
        assert json.loads(target.read_text()) == {"part": 1}

    monkeypatch.setattr(os, "replace", while_another_waits)
    assert write_json_once(target, {"part": 1}) and wrote == [False]
    assert list(tmp_path.iterdir()) == [target]


def test_without_hard_links_a_killed_writer_is_reported(
    tmp_path: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_RENAME_TIMEOUT", 0.0)
    target = tmp_path / "plan.json"
    claim = tmp_path / f".plan.00000000.{TEMPORARY_MARK}.json"
    claim.touch()
    with pytest.raises(RuntimeFailure, match=r"plan\.json: .* did not finish; remove .*00000000.* and try again"):
        write_json_once(target, {"part": 1})
    claim.unlink()
    assert write_json_once(target, {"part": 1}) and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF])
def test_file_systems_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", [1])
    assert write_json_once(tmp_path / "b.json", [2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize(("number", "folder"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_other_errors_of_syncing_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folder: bool
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folder:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_json(tmp_path / "a.json", [1])
