import errno
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from refdet.errors import InputError, RuntimeFailure
from refdet.files import atomic
from refdet.files.atomic import (
    TEMPORARY_MARK,
    atomic_create,
    atomic_write,
    find_temporary_files,
    write_json,
    write_json_once,
)


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "values.npz"
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".npz"
        temporary.write_text("text")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["values.npz"]
    assert target.read_text() == "text"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "values.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["values.txt"]
    assert target.read_text() == "old"


def test_errors_name_the_target_and_not_the_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "values.txt"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(target):
        pass  # nothing was written
    assert caught.value.filename == str(target)


def test_a_failed_cleanup_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(ValueError, match="the error itself"), atomic_write(tmp_path / "a.json"):
        raise ValueError("the error itself")


def test_a_file_name_that_is_too_long_fails_at_the_first_write(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 260 + ".json")
    with pytest.raises(OSError, match="name too long") as caught, atomic_write(target) as temporary:
        temporary.write_text("text")
        pytest.fail("written in vain, as the rename would fail")
    assert caught.value.filename == str(target)


LONG_NAMES = [
    "n" * 250 + ".json",
    "n" * 245 + ".json",
    "ü" * 125 + ".json",
    "n" * 255,
    "n." + "s" * 250,
    "n" * 221 + ".json",
]


@pytest.mark.parametrize("name", LONG_NAMES)
def test_the_longest_valid_file_names_can_be_written(tmp_path: Path, name: str) -> None:
    others = [other for other in LONG_NAMES if other != name]
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


def test_a_value_that_is_not_json_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.h5", "a", "a.tar.gz", ".hidden", "ümlaut [1].h5", "a.h5.parts", "x.refdet-tmp.h5"])
def test_find_temporary_files_ignores_similar_names(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    stem, suffix = target.stem, target.suffix
    similar = [f".{stem}.original{suffix}", f".{stem}.0123abcd{suffix}", f".{name}.notes",
               f".{stem}.0123abcX.{TEMPORARY_MARK}{suffix}", f"{stem}.0123abcd{TEMPORARY_MARK}{suffix}"]  # fmt: skip
    for other in similar:
        (tmp_path / other).write_text("not refdet's")
    with atomic_write(target) as temporary, atomic_write(tmp_path / "b.h5") as second:
        temporary.write_text("")
        second.write_text("")
        assert find_temporary_files(tmp_path, name) == [temporary]
        assert set(find_temporary_files(tmp_path)) == {temporary, second}
    assert find_temporary_files(tmp_path) == [] and find_temporary_files(tmp_path / "no") == []


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links."""

    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)


def check_that_a_file_that_appears_meanwhile_is_kept(target: Path) -> None:
    message = r"a\.csv exists; choose another `out` or remove it$"
    with pytest.raises(InputError, match=message), atomic_create(target) as temporary:
        temporary.write_text("new")
        target.write_text("of another process")
    assert target.read_text() == "of another process" and list(target.parent.iterdir()) == [target]
    target.unlink()
    with atomic_create(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and list(target.parent.iterdir()) == [target]


def test_a_created_file_never_replaces_another(tmp_path: Path) -> None:
    check_that_a_file_that_appears_meanwhile_is_kept(tmp_path / "a.csv")


def test_a_created_file_never_replaces_another_without_hard_links(tmp_path: Path, no_links: None) -> None:
    check_that_a_file_that_appears_meanwhile_is_kept(tmp_path / "a.csv")


def check_that_one_of_eight_threads_writes(target: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda part: write_json_once(target, {"part": part}), range(8)))
    assert wrote.count(True) == 1 and json.loads(target.read_text()) == {"part": wrote.index(True)}
    assert not write_json_once(target, {"part": 9}) and json.loads(target.read_text())["part"] != 9
    assert list(target.parent.iterdir()) == [target]


def test_only_one_of_many_threads_writes_the_file(tmp_path: Path) -> None:
    check_that_one_of_eight_threads_writes(tmp_path / "merging.json")


def test_only_one_of_many_threads_writes_the_file_without_hard_links(tmp_path: Path, no_links: None) -> None:
    check_that_one_of_eight_threads_writes(tmp_path / "merging.json")


def test_without_hard_links_a_second_writer_waits_for_the_first(
    tmp_path: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "plan.json", os.replace
    second_wrote = []

    def rename_while_the_second_waits(source: Path, destination: Path) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: rename(source, destination))  # the second writer sleeps
        second_wrote.append(write_json_once(target, {"part": 2}))
        assert json.loads(target.read_text()) == {"part": 1}

    monkeypatch.setattr(os, "replace", rename_while_the_second_waits)
    assert write_json_once(target, {"part": 1}) and second_wrote == [False]
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
def test_a_file_system_that_cannot_sync_folders_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, refused = os.fsync, []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", [1])
    assert write_json_once(tmp_path / "b.json", [2])
    assert len(refused) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize(
    ("number", "folder"),
    [pytest.param(errno.EIO, True, id="disk error in a folder"), pytest.param(errno.EINVAL, False, id="file")],
)
def test_other_sync_errors_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folder: bool
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folder:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_json(tmp_path / "a.json", [1])
