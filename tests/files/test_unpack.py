import io
import os
import random
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from refdet.errors import InputError, RuntimeFailure
from refdet.files.unpack import move_files, remove_unfinished, unpack_temporarily

FILES = {"top/a.json": b"{}", "top/b.p": b"x" * 5000, "other.txt": b"not wanted"}


MakeArchive = Callable[[Path, dict[str, bytes]], Path]


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


def target_path(member: str) -> str | None:
    """Select the files in top/, to be unpacked into data/."""
    return f"data/{Path(member).name}" if member.startswith("top/") else None


def unpack(archive: Path, out: Path) -> list[Path]:
    with unpack_temporarily(archive, "the archive", target_path, out) as folder:
        moved, _ = move_files(folder, out)
    return moved


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_only_selected_files_are_unpacked(tmp_path: Path, make: MakeArchive) -> None:
    archive = make(tmp_path / "archive", FILES)
    out = tmp_path / "out"
    assert unpack(archive, out) == [out / "data" / "a.json", out / "data" / "b.p"]
    assert (out / "data" / "b.p").read_bytes() == FILES["top/b.p"] and os.listdir(out) == ["data"]


@pytest.mark.parametrize("make", [as_zip, as_tar])
@pytest.mark.parametrize(
    "name", ["../top/evil", "top/../../evil", "/top/evil", "..\\evil", "C:\\evil", "top/a/../../../evil"]
)
def test_a_member_outside_the_folder_is_refused_and_nothing_is_written(
    tmp_path: Path, make: MakeArchive, name: str
) -> None:
    archive = make(tmp_path / "archive", FILES | {name: b"!"})
    with pytest.raises(InputError, match=r"the archive: .*evil' would be written outside its folder"):
        unpack(archive, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["archive", "out"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(tmp_path: Path, kind: int) -> None:
    archive = as_zip(tmp_path / "archive", {"top/link": b"/etc/passwd"}, kind)
    with pytest.raises(InputError, match="is a link or device"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = as_tar(tmp_path / "archive", {"top/link": b""}, kind)
    with pytest.raises(InputError, match="is a link or device"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_two_members_for_the_same_target_are_refused(tmp_path: Path, make: MakeArchive) -> None:
    archive = make(tmp_path / "archive", {"top/a": b"1", "top/b/a": b"2"})
    with pytest.raises(InputError, match="duplicate data/a"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_an_archive_truncated_anywhere_is_refused(tmp_path: Path, make: MakeArchive) -> None:
    whole = make(tmp_path / "whole", FILES).read_bytes()
    archive = tmp_path / "archive"
    out = tmp_path / "out"
    for length in range(len(whole)):
        archive.write_bytes(whole[:length])
        with pytest.raises(InputError, match="the archive: "):
            unpack(archive, out)
        assert os.listdir(out) == []


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_changed_bytes_in_a_compressed_tar_are_refused(tmp_path: Path, kind: str) -> None:
    data = random.Random(0).randbytes(50_000)
    archive, out = tmp_path / "archive", tmp_path / "out"
    with tarfile.open(archive, f"w:{kind}") as file:
        info = tarfile.TarInfo("top/a")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    whole = archive.read_bytes()
    refused = 0
    offsets = range(0, len(whole), 977)
    for offset in offsets:
        archive.write_bytes(whole[:offset] + bytes(8) + whole[offset + 8 :])
        try:
            unpack(archive, out)
        except InputError:  # and no other error
            refused += 1
        else:  # where the bytes were zero before
            assert (out / "data" / "a").read_bytes() == data, offset
        shutil.rmtree(out)
    assert refused >= len(offsets) - 1


def test_an_existing_file_with_other_contents_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "a.json").write_bytes(b"my own")
    (out / "data" / "b.p").write_bytes(FILES["top/b.p"])
    (out / ".unpacking-of-another-time").mkdir()
    remove_unfinished(out)
    with unpack_temporarily(as_zip(tmp_path / "archive", FILES), "the archive", target_path, out) as folder:
        assert move_files(folder, out) == ([out / "data" / "b.p"], [out / "data" / "a.json"])
    assert (out / "data" / "a.json").read_bytes() == b"my own" and os.listdir(out) == ["data"]


def test_a_flipped_bit_in_a_zip_is_refused(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "archive", FILES)
    data = bytearray(archive.read_bytes())
    data[data.index(b"top/b.p") + 12] ^= 4
    archive.write_bytes(bytes(data))
    with pytest.raises(InputError, match="damaged archive|another size"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_too_little_disk_space_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = as_zip(tmp_path / "archive", FILES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 5000))
    # 5002 bytes and a reserve of 2**26
    with pytest.raises(RuntimeFailure, match=r"needs 67\.1 MB, 67\.1 MB more than is free; free some space"):
        unpack(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
