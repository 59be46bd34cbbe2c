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

DATA = b"PK\x03\x04" + random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()
# file offsets at which responses end: the first has 5000 bytes, the six that continue at 5000 have none
STALLED = (5000,) * 7


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as served:
        yield served


def get(site: Site, folder: Path, path: str = "/a.zip", checksum: str | None = None, size: int | None = None) -> str:
    return download(site.address + path, folder / "a.zip", checksum, size, wait=0)


@pytest.mark.parametrize("checksum", [None, f"sha256:{SHA256}", f"md5:{MD5}"])
def test_a_file_is_downloaded_and_its_sha256_returned(site: Site, tmp_path: Path, checksum: str | None) -> None:
    site.add("/a.zip", DATA)
    assert get(site, tmp_path, checksum=checksum, size=len(DATA)) == SHA256
    assert (tmp_path / "a.zip").read_bytes() == DATA and os.listdir(tmp_path) == ["a.zip"]


def test_a_dropped_connection_is_resumed_at_the_last_byte(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, cuts=[1000, 1000, 1_200, 250_000])
    assert get(site, tmp_path) == SHA256
    # the second response ends at its first byte, 1000, so the third request asks for the same
    assert file.requests == ["", "bytes=1000-", "bytes=1000-", "bytes=1200-", "bytes=250000-"]


def test_without_ranges_a_dropped_download_starts_again(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, cuts=[1000], ranges=False)
    assert get(site, tmp_path) == SHA256 and len(file.requests) == 2


def test_a_file_with_a_new_etag_is_not_mixed_with_the_partial_download(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", bytes(len(DATA)), cuts=list(STALLED))
    with pytest.raises(DownloadFailure, match=r"/a\.zip: "):
        get(site, tmp_path)
    assert (tmp_path / "a.zip.part").stat().st_size == 5000
    site.add("/a.zip", DATA, etag='"2"')
    assert get(site, tmp_path) == SHA256


@pytest.mark.parametrize(
    "other", [pytest.param(bytes(len(DATA) + 10), id="longer"), pytest.param(bytes(len(DATA) - 10), id="shorter")]
)
def test_without_an_etag_a_changed_file_is_detected_by_its_size(site: Site, tmp_path: Path, other: bytes) -> None:
    site.add("/a.zip", DATA, cuts=list(STALLED), etag="")
    with pytest.raises(DownloadFailure):
        get(site, tmp_path)
    file = site.add("/a.zip", other, etag="")
    assert get(site, tmp_path) == hashlib.sha256(other).hexdigest() and file.requests == ["bytes=5000-", ""]


def test_the_next_run_resumes_the_partial_download(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, cuts=list(STALLED))
    with pytest.raises(DownloadFailure):
        get(site, tmp_path)
    file.requests.clear()
    file.cuts.clear()
    assert get(site, tmp_path) == SHA256
    assert file.requests == ["bytes=5000-"]


def test_the_partial_download_of_another_url_is_not_used(site: Site, tmp_path: Path) -> None:
    site.add("/b.zip", bytes(9000), cuts=list(STALLED))
    with pytest.raises(DownloadFailure):
        get(site, tmp_path, "/b.zip")
    file = site.add("/a.zip", DATA)
    assert get(site, tmp_path) == SHA256 and file.requests == [""]


def test_a_failing_url_keeps_the_partial_download_of_another(site: Site, tmp_path: Path) -> None:
    file = site.add("/b.zip", DATA, cuts=list(STALLED))
    site.add("/page.zip", b"<html>Sign in</html>", kind="text/html")
    site.add("/empty.zip", b"", lengths=False)
    site.add("/busy.zip", status=503)
    for checksum in (None, f"sha256:{SHA256}"):
        for path in ("/b.zip", "/none.zip", "/busy.zip", "/page.zip", "/empty.zip"):  # the server has no /none.zip
            with pytest.raises((DownloadFailure, WrongDownload)):
                get(site, tmp_path, path, checksum, len(DATA))
            assert (tmp_path / "a.zip.part").read_bytes() == DATA[:5000], path
        file.cuts[:] = STALLED
    file.cuts.clear()
    file.requests.clear()
    assert get(site, tmp_path, "/b.zip") == SHA256 and file.requests == ["bytes=5000-"]


def test_an_html_page_keeps_the_partial_download_of_its_url(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", DATA, cuts=list(STALLED))
    with pytest.raises(DownloadFailure):
        get(site, tmp_path)
    for page, size in ((b"<html>Sign in</html>", None), (b"Busy", len(DATA))):  # the second is known by its size
        site.add("/a.zip", page, ranges=False)
        with pytest.raises(WrongDownload):
            get(site, tmp_path, size=size)
    file = site.add("/a.zip", DATA)
    assert get(site, tmp_path) == SHA256 and file.requests == ["bytes=5000-"]


@pytest.mark.parametrize(
    "first", [pytest.param(DATA, id="same file"), pytest.param(bytes(len(DATA)), id="another file")]
)
def test_with_a_sha256_another_url_resumes_the_partial_download(site: Site, tmp_path: Path, first: bytes) -> None:
    site.add("/b.zip", first, cuts=list(STALLED))
    with pytest.raises(DownloadFailure):
        get(site, tmp_path, "/b.zip", f"sha256:{SHA256}")
    file = site.add("/a.zip", DATA, cuts=[9000], etag='"2"')
    assert get(site, tmp_path, checksum=f"sha256:{SHA256}") == SHA256
    again = [] if first is DATA else [""]  # after the checksum mismatch, all of it from this URL
    assert file.requests == ["bytes=5000-", "bytes=9000-", *again]


def test_a_later_run_knows_that_the_start_is_from_another_url(site: Site, tmp_path: Path) -> None:
    site.add("/b.zip", bytes(len(DATA)), cuts=list(STALLED))
    file = site.add("/a.zip", DATA, cuts=[9000] * 7)
    for path in ("/b.zip", "/a.zip"):
        with pytest.raises(DownloadFailure):
            get(site, tmp_path, path, f"sha256:{SHA256}")
    file.cuts.clear()
    file.requests.clear()
    assert get(site, tmp_path, checksum=f"sha256:{SHA256}") == SHA256
    assert file.requests == ["bytes=9000-", ""]  # after the checksum mismatch, all of it from this URL


def test_a_response_without_content_length_is_downloaded(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", DATA, lengths=False)
    assert get(site, tmp_path) == SHA256


def test_without_content_length_an_early_end_is_resumed(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", DATA, lengths=False, cuts=[1000, 1200])
    assert get(site, tmp_path, size=len(DATA)) == SHA256
    assert file.requests == ["", "bytes=1000-", "bytes=1200-"]


@pytest.mark.parametrize("data", [pytest.param(DATA[:-1], id="short"), pytest.param(DATA + b"?", id="long")])
def test_without_content_length_a_wrong_size_is_rejected(site: Site, tmp_path: Path, data: bytes) -> None:
    site.add("/a.zip", data, lengths=False, ranges=False)
    with pytest.raises((DownloadFailure, WrongDownload), match=r"closed early|of 300,005 bytes instead of 300,004"):
        get(site, tmp_path, size=len(DATA))
    assert not (tmp_path / "a.zip").exists()


def test_redirects_are_followed_but_not_in_a_circle(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", status=302, location="/moved/a.zip")
    site.add("/moved/a.zip", DATA, cuts=[7000])
    assert get(site, tmp_path) == SHA256
    site.add("/round.zip", status=302, location="/round.zip")
    with pytest.raises(DownloadFailure, match="redirects"):
        get(site, tmp_path / "2", "/round.zip")


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_client_error_is_raised_at_once(site: Site, tmp_path: Path, status: int) -> None:
    site.add("/a.zip", status=status)
    with pytest.raises(DownloadFailure, match=rf"/a\.zip: {status} "):
        get(site, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_busy_server_is_tried_six_times(site: Site, tmp_path: Path) -> None:
    file = site.add("/a.zip", status=503)
    with pytest.raises(DownloadFailure, match="503 Service Unavailable"):
        get(site, tmp_path)
    assert len(file.requests) == 6


def test_a_refused_connection_names_the_url(tmp_path: Path) -> None:
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
def test_an_html_page_is_rejected(site: Site, tmp_path: Path, data: bytes, kind: str) -> None:
    site.add("/a.zip", data, kind=kind)
    with pytest.raises(WrongDownload, match="an HTML page, not the file"):
        get(site, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("checksum", [f"sha256:{SHA256}", f"md5:{MD5}"])
def test_a_checksum_mismatch_removes_the_file(site: Site, tmp_path: Path, checksum: str) -> None:
    other = DATA[:-1] + b"?"
    site.add("/a.zip", other)
    kind, _, right = checksum.partition(":")
    found = hashlib.new(kind, other).hexdigest()
    with pytest.raises(WrongDownload, match=rf"checksum mismatch \({kind} {found} instead of {right}\)"):
        get(site, tmp_path, checksum=checksum)
    assert os.listdir(tmp_path) == []


def test_a_wrong_content_length_is_rejected_before_the_download(site: Site, tmp_path: Path) -> None:
    site.add("/a.zip", DATA)
    with pytest.raises(WrongDownload, match="another file, of 300,004 bytes instead of 13,510,573,713"):
        get(site, tmp_path, size=13_510_573_713)
    assert os.listdir(tmp_path) == []


def test_too_little_disk_space_is_reported_before_the_download(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("/a.zip", DATA)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 400_000))
    # 300,004 bytes and a reserve of 2**26
    with pytest.raises(RuntimeFailure, match=r"needs 67\.4 MB, 67\.0 MB more than is free in .*; free some space"):
        get(site, tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_a_disk_that_fills_up_keeps_the_partial_download(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = site.add("/a.zip", DATA, cuts=[200_000])
    real_open = Path.open

    class FileOnFullDisk:
        """A file that takes 1000 bytes more."""

        def __init__(self, opened: Any) -> None:
            self.opened, self.name = opened, opened.name

        def __enter__(self) -> "FileOnFullDisk":
            return self

        def __exit__(self, *_: object) -> None:
            self.opened.close()

        def write(self, data: bytes) -> None:
            self.opened.write(data[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_on_full_disk(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened = real_open(path, *args, **kwargs)
        return FileOnFullDisk(opened) if path.suffix == ".part" else opened

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(RuntimeFailure, match=r"a\.zip\.part: no space left on the disk; .* is kept"):
        get(site, tmp_path)
    monkeypatch.undo()
    assert get(site, tmp_path) == SHA256 and file.requests[-1] == "bytes=1000-"
