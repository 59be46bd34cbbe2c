import io
import os
import random
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

from refdet.errors import InputError, RuntimeFailure
from refdet.files.unpack import move_files, remove_unfinished, unpack_temporarily

FILES = {"top/a.json": b"{}", "top/b.p": b"x" * 5000, "other.txt": b"not wanted"}


def as_zip(path: Path, files: dict[str, bytes], kind: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return path


def as_tar(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info, io.BytesIO(data))
    return path


def place(member: str) -> str | None:
    return f"data/{Path(member).name}" if member.startswith("top/") else None


def unpack(archive: Path, out: Path) -> list[Path]:
    with unpack_temporarily(archive, "the archive", place, out) as folder:
        return move_files(folder, out)[0]


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_the_wanted_files(tmp_path: Path, make: object) -> None:
    archive = make(tmp_path / "archive", FILES)  # type: ignore[operator]
    out = tmp_path / "out"
    assert unpack(archive, out) == [out / "data" / "a.json", out / "data" / "b.p"]
    assert (out / "data" / "b.p").read_bytes() == FILES["top/b.p"] and os.listdir(out) == ["data"]


@pytest.mark.parametrize("make", [as_zip, as_tar])
@pytest.mark.parametrize(
    "name", ["../top/evil", "top/../../evil", "/top/evil", "..\\evil", "C:\\evil", "top/a/../../../evil"]
)
def test_nothing_is_written_outside(tmp_path: Path, make: object, name: str) -> None:
    archive = make(tmp_path / "archive", FILES | {name: b"!"})  # type: ignore[operator]
    with pytest.raises(InputError, match=r"the archive: .*evil' would be written outside its folder"):
        unpack(archive, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["archive", "out"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_zips(tmp_path: Path, kind: int) -> None:
    archive = as_zip(tmp_path / "archive", {"top/link": b"/etc/passwd"}, kind)
    with pytest.raises(InputError, match="is a link or device"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars(tmp_path: Path, kind: bytes) -> None:
    archive = as_tar(tmp_path / "archive", {"top/link": b""}, kind)
    with pytest.raises(InputError, match="is a link or device"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_two_members_for_a_file(tmp_path: Path, make: object) -> None:
    archive = make(tmp_path / "archive", {"top/a": b"1", "top/b/a": b"2"})  # type: ignore[operator]
    with pytest.raises(InputError, match="duplicate data/a"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_every_cut_is_noticed(tmp_path: Path, make: object) -> None:
    whole = make(tmp_path / "whole", FILES).read_bytes()  # type: ignore[operator]
    archive = tmp_path / "archive"
    out = tmp_path / "out"
    complete = 0
    for length in range(0, len(whole), 7):
        archive.write_bytes(whole[:length])
        try:
            unpack(archive, out)
            complete += 1
        except InputError:
            assert os.listdir(out) == []
    assert complete <= len(whole) // 7 * (make is as_tar)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_bytes_that_changed_in_a_tar(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "archive"
    with tarfile.open(archive, f"w:{kind}") as file:
        info = tarfile.TarInfo("top/a")
        info.size = 50_000
        file.addfile(info, io.BytesIO(random.Random(0).randbytes(info.size)))
    whole = archive.read_bytes()
    for place_of_change in range(0, len(whole), 977):
        archive.write_bytes(whole[:place_of_change] + bytes(8) + whole[place_of_change + 8 :])
        with suppress(InputError):  # and no other error
            unpack(archive, tmp_path / "out")


def test_files_that_exist_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "a.json").write_bytes(b"my own")
    (out / "data" / "b.p").write_bytes(FILES["top/b.p"])
    (out / ".unpacking-of-another-time").mkdir()
    remove_unfinished(out)
    with unpack_temporarily(as_zip(tmp_path / "archive", FILES), "the archive", place, out) as folder:
        assert move_files(folder, out) == ([out / "data" / "b.p"], [out / "data" / "a.json"])
    assert (out / "data" / "a.json").read_bytes() == b"my own" and os.listdir(out) == ["data"]


def test_a_bit_that_flipped(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "archive", FILES)
    data = bytearray(archive.read_bytes())
    data[data.index(b"top/b.p") + 12] ^= 4
    archive.write_bytes(bytes(data))
    with pytest.raises(InputError, match="damaged archive|another size"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = as_zip(tmp_path / "archive", FILES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 5000))
    with pytest.raises(RuntimeFailure, match=r"needs 67\.1 MB, 67\.1 MB more than is free; free some space"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
