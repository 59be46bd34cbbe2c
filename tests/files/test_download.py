import errno
import hashlib
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_server import Site, serving

from refdet.errors import RuntimeFailure
from refdet.files.download import DownloadFailure, WrongDownload, download
from refdet.files.short_text import format_bytes

DATA = b"PK\x03\x04" + random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as served:
        yield served


def get(site: Site, folder: Path, path: str = "/a.zip", checksum: str | None = None, size: int | None = None) -> str:
    return download(site.address + path, folder / "a.zip", checksum, size, wait=0)


@pytest.mark.parametrize("checksum", [None, f"sha256:{SHA256}", f"md5:{MD5}"])
def test_a_file(site: Site, tmp_path: Path, checksum: str | None) -> None:
    site.add("/a.zip", DATA)
    assert get(site, tmp_path, checksum=checksum, size=len(DATA)) == SHA256
    assert (tmp_path / "a.zip").read_bytes() == DATA and os.listdir(tmp_path) == ["a.zip"]


def test_a_connection_that_is_cut_goes_on_where_it_was(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, cuts=[1000, 1000, 1_200, 250_000])
    assert get(site, tmp_path) == SHA256
    assert file.requests == ["", "bytes=1000-", "bytes=1000-", "bytes=1200-", "bytes=250000-"]


def test_a_server_without_ranges_starts_again(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, cuts=[1000], ranges=False)
    assert get(site, tmp_path) == SHA256 and len(file.requests) == 2


def test_a_file_that_changed_in_between_is_not_mixed(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", bytes(len(DATA)), cuts=[5000] * 9)
    with pytest.raises(DownloadFailure, match=r"/a\.zip: "):
        get(site, tmp_path)
    assert (tmp_path / "a.zip.part").stat().st_size == 5000
    site.add("/a.zip", DATA, etag='"2"')
    assert get(site, tmp_path) == SHA256


@pytest.mark.parametrize("other", [bytes(len(DATA) + 10), bytes(len(DATA) - 10)])
def test_a_change_is_seen_by_the_size_if_the_server_names_no_version(site: Site, tmp_path: Path, other: bytes) -> None:
    site.add("/a.zip", DATA, cuts=[5000] * 7, etag="")
    with pytest.raises(DownloadFailure):
        get(site, tmp_path)
    file = site.add("/a.zip", other, etag="")
    assert get(site, tmp_path) == hashlib.sha256(other).hexdigest() and file.requests == ["bytes=5000-", ""]


def test_the_next_run_continues(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, cuts=[5000] * 7)
    with pytest.raises(DownloadFailure):
        get(site, tmp_path)
    file.requests.clear()
    file.cuts.clear()
    assert get(site, tmp_path) == SHA256
    assert file.requests == ["bytes=5000-"]


def test_the_part_of_another_address_is_not_used(site: Site, tmp_path: Path) -> None:
    site.add("/b.zip", bytes(9000), cuts=[5000] * 7)
    with pytest.raises(DownloadFailure):
        get(site, tmp_path, "/b.zip")
    file = site.add("/a.zip", DATA)
    assert get(site, tmp_path) == SHA256 and file.requests == [""]


def test_a_source_that_fails_leaves_the_part_of_another(site: Site, tmp_path: Path) -> None:
    file = site.add("/b.zip", DATA, cuts=[5000] * 7)
    site.add("/page.zip", b"<html>Sign in</html>", kind="text/html")
    site.add("/empty.zip", b"", lengths=False)
    site.add("/busy.zip", status=503)
    for checksum in (None, f"sha256:{SHA256}"):
        for path in ("/b.zip", "/none.zip", "/busy.zip", "/page.zip", "/empty.zip"):
            with pytest.raises((DownloadFailure, WrongDownload)):
                get(site, tmp_path, path, checksum, len(DATA))
            assert (tmp_path / "a.zip.part").read_bytes() == DATA[:5000], path
        file.cuts[:] = [5000] * 7
    file.cuts.clear()
    file.requests.clear()
    assert get(site, tmp_path, "/b.zip") == SHA256 and file.requests == ["bytes=5000-"]


def test_a_page_leaves_the_part_of_the_same_address(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", DATA, cuts=[5000] * 7)
    with pytest.raises(DownloadFailure):
        get(site, tmp_path)
    for body, size in ((b"<html>Sign in</html>", None), (b"Busy", len(DATA))):
        site.add("/a.zip", body, ranges=False)
        with pytest.raises(WrongDownload):
            get(site, tmp_path, size=size)
    file = site.add("/a.zip", DATA)
    assert get(site, tmp_path) == SHA256 and file.requests == ["bytes=5000-"]


@pytest.mark.parametrize("first", [DATA, bytes(len(DATA))])
def test_another_source_continues_what_has_a_checksum(site: Site, tmp_path: Path, first: bytes) -> None:
    site.add("/b.zip", first, cuts=[5000] * 7)
    with pytest.raises(DownloadFailure):
        get(site, tmp_path, "/b.zip", f"sha256:{SHA256}")
    file = site.add("/a.zip", DATA, cuts=[9000], etag='"2"')
    assert get(site, tmp_path, checksum=f"sha256:{SHA256}") == SHA256
    assert file.requests == ["bytes=5000-", "bytes=9000-", *([] if first is DATA else [""])]


def test_a_length_that_is_not_said(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", DATA, lengths=False)
    assert get(site, tmp_path) == SHA256


def test_without_a_length_an_early_end_is_resumed(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, lengths=False, cuts=[1000, 1200])
    assert get(site, tmp_path, size=len(DATA)) == SHA256
    assert file.requests == ["", "bytes=1000-", "bytes=1200-"]


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"?"])
def test_without_a_length_another_size_is_rejected(site: Site, tmp_path: Path, data: bytes) -> None:
    site.add("/a.zip", data, lengths=False, ranges=False)
    with pytest.raises((DownloadFailure, WrongDownload), match=r"closed early|of 300,005 bytes instead of 300,004"):
        get(site, tmp_path, size=len(DATA))
    assert not (tmp_path / "a.zip").exists()


def test_redirects(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", status=302, location="/moved/a.zip")
    site.add("/moved/a.zip", DATA, cuts=[7000])
    assert get(site, tmp_path) == SHA256
    site.add("/round.zip", status=302, location="/round.zip")
    with pytest.raises(DownloadFailure, match="redirects"):
        get(site, tmp_path / "2", "/round.zip")


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_not_there(site: Site, tmp_path: Path, status: int) -> None:
    site.add("/a.zip", status=status)
    with pytest.raises(DownloadFailure, match=rf"/a\.zip: {status} "):
        get(site, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_server_that_is_busy_is_asked_again(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", status=503)
    with pytest.raises(DownloadFailure, match="503 Service Unavailable"):
        get(site, tmp_path)
    assert len(file.requests) == 6


def test_no_server(tmp_path: Path) -> None:
    with serving() as closed:
        address = closed.address
    with pytest.raises(DownloadFailure, match=r"/a\.zip: .*refused"):
        download(f"{address}/a.zip", tmp_path / "a.zip", None, None, wait=0)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"<!DOCTYPE html>\n<html>Sorry</html>", "application/zip"),
        (b"\n <html>", "application/octet-stream"),
        (b"Sign in", "text/html; charset=utf-8"),
    ],
)
def test_a_page_instead_of_the_file(site: Site, tmp_path: Path, data: bytes, kind: str) -> None:
    site.add("/a.zip", data, kind=kind)
    with pytest.raises(WrongDownload, match="an HTML page, not the file"):
        get(site, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("checksum", [f"sha256:{SHA256}", f"md5:{MD5}"])
def test_other_bytes(site: Site, tmp_path: Path, checksum: str) -> None:
    other = DATA[:-1] + b"?"
    site.add("/a.zip", other)
    kind, _, right = checksum.partition(":")
    found = hashlib.new(kind, other).hexdigest()
    with pytest.raises(WrongDownload, match=rf"checksum mismatch \({kind} {found} instead of {right}\)"):
        get(site, tmp_path, checksum=checksum)
    assert os.listdir(tmp_path) == []


def test_another_size_is_seen_before_the_download(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", DATA)
    with pytest.raises(WrongDownload, match="another file, of 300,004 bytes instead of 13,510,573,713"):
        get(site, tmp_path, size=13_510_573_713)
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("/a.zip", DATA)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 400_000))
    with pytest.raises(RuntimeFailure, match=r"needs 67\.4 MB, 67\.0 MB more than is free in .*; free some space"):
        get(site, tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_a_disk_that_gets_full_keeps_what_is_there(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = site.add("/a.zip", DATA, cuts=[200_000])
    real = Path.open

    class Full:
        def __init__(self, opened: Any) -> None:
            self.opened, self.name = opened, opened.name

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.opened.close()

        def write(self, data: bytes) -> None:
            self.opened.write(data[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: Full(real(path, *a, **k)) if path.suffix == ".part" else real(path, *a, **k)
    )
    with pytest.raises(RuntimeFailure, match=r"a\.zip\.part: no space left on the disk; .* is kept"):
        get(site, tmp_path)
    monkeypatch.undo()
    assert get(site, tmp_path) == SHA256 and file.requests[-1] == "bytes=1000-"


def test_sizes() -> None:
    assert [format_bytes(n) for n in (5, 1000, 45_613_210, 13_510_573_713)] == [
        "5 bytes",
        "1.0 kB",
        "45.6 MB",
        "13.5 GB",
    ]
