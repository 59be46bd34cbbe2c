"""Folders and zips of images: links, pipes, damaged or malicious zip members, and how much of them is read."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refdet.data.coco import ImageRecord
from refdet.data.image_decoder import max_file_size
from refdet.data.image_source import ImageError, ImageSource
from refdet.errors import InputError, RuntimeFailure
from refer.image_folder import list_folder
from refer.plain_files import read_file

RECORD = ImageRecord(1, "x.png", 6, 9)


def write_png(path: Path, value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 9, 3), value, np.uint8)).save(path)


def value_of(source: ImageSource, name: str) -> int:
    return int(source.read(ImageRecord(1, name, 6, 9))[0, 0, 0])


def test_links_to_parent_folders_are_not_followed_forever(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for number in range(50):
        write_png(root / f"train/{number}.png")
    for name in ("a", "b", "c"):
        (root / name).symlink_to(".")
        (root / "train" / name).symlink_to(root / "train")
        (root / "train" / f"up{name}").symlink_to(root)
    started = time.process_time()
    listing = list_folder(root)
    assert time.process_time() - started < 2
    assert sorted(listing.files) == sorted(f"train/{number}.png" for number in range(50))
    assert len(listing.link_targets) == 9
    for name in ("train/3.png", "a/train/3.png", "a/b/c/train/3.png", "train/a/b/3.png", "train/upa/b/train/a/3.png"):
        assert value_of(ImageSource.open(root), name) == 7, name


def test_links_out_of_the_folder_are_followed_except_to_its_parents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data/images"
    write_png(tmp_path / "disk/train/x.png", 1)
    write_png(tmp_path / "data/other/x.png", 2)
    write_png(tmp_path / "data/other/z.png", 3)
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "disk/train")
    (root / "again").symlink_to(tmp_path / "disk/train")
    (root / "whole").symlink_to(tmp_path / "disk")
    (root / "y.png").symlink_to(tmp_path / "data/other/x.png")
    (root / "up").symlink_to("..")
    (root / "top").symlink_to("/")
    source = ImageSource.open(root)
    for name, value in {"train/x.png": 1, "again/x.png": 1, "whole/train/x.png": 1, "y.png": 2}.items():
        assert value_of(source, name) == value
    assert value_of(source, "x.png") == 1  # unambiguous, as all three paths lead to the same file
    assert "to a parent folder is not followed" in caplog.text
    with pytest.raises(ImageError, match="no file of that name"):
        source.read(ImageRecord(1, "up/other/z.png", 6, 9))


def test_files_are_listed_under_their_real_folder_not_a_link_to_it(tmp_path: Path) -> None:
    for folder in ("z", "y"):
        write_png(tmp_path / folder / "x.png", ord(folder))
    (tmp_path / "a").symlink_to("z")
    source = ImageSource.open(tmp_path)
    assert [value_of(source, f"{folder}/x.png") for folder in "azy"] == [ord("z"), ord("z"), ord("y")]
    with pytest.raises(ImageError, match="ambiguous file name: y/x.png, z/x.png"):
        source.read(RECORD)


def test_links_to_one_file_are_not_ambiguous(tmp_path: Path) -> None:
    write_png(tmp_path / "a/x.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.png").symlink_to("../a/x.png")
    (tmp_path / "c").mkdir()
    os.link(tmp_path / "a/x.png", tmp_path / "c/x.png")
    assert value_of(ImageSource.open(tmp_path), "x.png") == 7


def test_pipes_devices_sockets_and_broken_links_are_never_opened(tmp_path: Path) -> None:
    write_png(tmp_path / "other/x.png")
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images/pipe.png")
    (tmp_path / "images/gone.png").symlink_to("nothing")
    (tmp_path / "images/loop.png").symlink_to("loop.png")
    (tmp_path / "images/pipelink.png").symlink_to("pipe.png")
    (tmp_path / "images/device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "images/socket.png"))
        for name, why in (
            ("pipe", "a named pipe, not a file"),
            ("gone", "a broken link"),
            ("loop", "a link that cannot be followed"),
            ("pipelink", "a named pipe, not a file"),
            ("device", "a device, not a file"),
            ("socket", "a socket, not a file"),
        ):
            # An image of that name in another folder must not replace it.
            write_png(tmp_path / "other" / f"{name}.png")
            record = ImageRecord(1, f"images/{name}.png", 6, 9)
            with pytest.raises(ImageError, match=f"images/{name}.png is {why}"):
                ImageSource.open(tmp_path).read(record)
            with pytest.raises(InputError, match=f"images/{name}.png is {why}"):
                ImageSource.open(tmp_path).check([record], Path("i.json"))
    with pytest.raises(InputError, match="pipe.png: no such file or folder; give a folder or zip"):
        ImageSource.open(tmp_path / "images/pipe.png")


def test_a_file_replaced_by_a_pipe_does_not_block(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png")
    source = ImageSource.open(tmp_path)
    (tmp_path / "x.png").unlink()
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageError, match="not a readable image .not a regular file"):
        source.read(RECORD)
    for path in ("/dev/null", "/dev/zero", str(tmp_path)):
        with pytest.raises(OSError):
            read_file(path, 100)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_subfolders_that_cannot_be_listed_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_png(tmp_path / "open/x.png")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).rstrip("/").endswith("closed"):
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    if number == errno.EIO:  # a fault of the disk, not of the folder's permissions
        with pytest.raises(RuntimeFailure, match="cannot be listed now .*Input/output error"):
            ImageSource.open(tmp_path)
        return
    assert value_of(ImageSource.open(tmp_path), "x.png") == 7
    assert "1 subfolder cannot be listed, first: closed (Permission denied)" in caplog.text
    with pytest.raises(InputError, match="closed: cannot be listed"):
        ImageSource.open(tmp_path / "closed")


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]


@pytest.mark.parametrize("method", METHODS)
def test_zips_of_every_supported_compression_method(tmp_path: Path, method: int) -> None:
    write_png(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "i.zip", "w", method) as archive:
        archive.write(tmp_path / "x.png", "x.png")
        with archive.open(zipfile.ZipInfo("large.png"), "w", force_zip64=True) as member:
            member.write((tmp_path / "x.png").read_bytes())
    source = ImageSource.open(tmp_path / "i.zip")
    assert value_of(source, "x.png") == value_of(source, "large.png") == 7


@pytest.mark.parametrize("method", METHODS)
def test_a_zip_member_with_a_wrong_checksum_is_an_image_error(tmp_path: Path, method: int) -> None:
    write_png(tmp_path / "x.png")
    path = tmp_path / "i.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(tmp_path / "x.png", "x.png")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 16] ^= 1  # the checksum in the zip directory
    path.write_bytes(data)
    with pytest.raises(ImageError, match="Bad CRC-32"):
        ImageSource.open(path).read(RECORD)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stated_size", [None, 100])
def test_zip_members_that_unpack_to_too_much_are_not_unpacked(
    tmp_path: Path, method: int, stated_size: int | None
) -> None:
    """Whether the zip directory states the true size or a false, small one."""
    path, size = tmp_path / "i.zip", max_file_size(6, 9) + 1
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.png", bytes(size))
    if stated_size is not None:
        data = bytearray(path.read_bytes())
        struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, stated_size)
        path.write_bytes(data)
    source = ImageSource.open(path)
    tracemalloc.start()
    try:
        message = "the limit for an image" if stated_size is None else "x.png: not a readable image"
        with pytest.raises(ImageError, match=message):
            source.read(RECORD)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20 or method == zipfile.ZIP_STORED
    finally:
        tracemalloc.stop()


def test_zip_members_that_cannot_be_read_are_image_errors(tmp_path: Path) -> None:
    path = tmp_path / "i.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("secret.png", "twice.png", "twice.png", "odd.png"):
            with pytest.warns(UserWarning) if name in archive.namelist() else contextlib.nullcontext():
                archive.writestr(name, b"data")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "secret.png")
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\x01\x02")
    data[first + 8] |= 1  # encrypted
    odd = data.index(b"PK\x01\x02", data.index(b"twice.png", data.index(b"twice.png", first) + 1))
    data[odd + 10] = 14  # LZMA
    path.write_bytes(data)
    source = ImageSource.open(path)
    for name, why in (
        ("secret.png", "is encrypted; unpack the zip"),
        ("twice.png", "ambiguous file name: duplicate twice.png"),
        ("odd.png", "is compressed by unsupported method 14; unpack the zip"),
        ("link.png", "is a link; unpack the zip"),
    ):
        with pytest.raises(ImageError, match=why):
            source.read(ImageRecord(1, name, 6, 9))


def test_names_of_zip_members_are_compared_but_never_used_as_paths(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        for name in ("../../a.png", "/etc/b.png", "C:\\photos\\c.png", "d/"):
            archive.write(tmp_path / "x.png", name) if not name.endswith("/") else archive.writestr(name, "")
    source = ImageSource.open(tmp_path / "i.zip")
    for name in ("a.png", "../../a.png", "etc/b.png", "b.png", "photos/c.png", "C:/photos/c.png"):
        assert value_of(source, name) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.zip", "x.png"]


def test_utf8_names_without_the_utf8_flag(tmp_path: Path) -> None:
    """As macOS writes zips."""
    write_png(tmp_path / "x.png")
    path = tmp_path / "i.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "x.png", "фото.png")
    data = path.read_bytes()
    for start, place in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        at = data.index(start) + place
        data = data[:at] + bytes([data[at] & ~8]) + data[at + 1 :]
    path.write_bytes(data)
    assert value_of(ImageSource.open(path), "фото.png") == 7


def test_damaged_zip_directories_are_refused_or_read_correctly(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png")
    path = tmp_path / "i.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "x.png", "фото.png")
    whole = path.read_bytes()
    directory, end = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    damaged = {"bad UTF-8": whole[: directory + 46] + b"\xff\xfe" + whole[directory + 48 :], "cut": whole[:-5]}
    for place in range(directory, len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x81
        damaged[f"byte {place - end}"] = bytes(changed)
    refused = set()
    for kind, data in damaged.items():
        path.write_bytes(data)
        try:
            source = ImageSource.open(path)
        except InputError as error:
            assert "i.zip: not a readable zip" in str(error), kind
            refused.add(kind)
            continue
        with contextlib.suppress(ImageError):
            assert value_of(source, "фото.png") == 7, kind
    assert {"bad UTF-8", "cut"} <= refused
