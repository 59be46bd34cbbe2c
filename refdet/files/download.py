"""Download large files over HTTP, resuming downloads whose connection was lost or whose process was killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pooch
import requests
import urllib3

from refdet.errors import InputError, RuntimeFailure
from refdet.files.atomic import report_disk_full
from refdet.files.progress import progress_bar
from refdet.files.short_text import format_missing_space, shorten

RESERVED_BYTES = 2**26  # disk space to leave free
_CHUNK_BYTES = 2**20
_TIMEOUT = (20, 60)  # seconds to connect, and between two packets
_MAX_TRIES = 6  # consecutive tries without receiving a byte, after which a download fails
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# the start of an error or login page; some file servers send errors as XML
_HTML = re.compile(rb"\s*(?:<!doctype\s+html|<html|<head|<\?xml)", re.IGNORECASE)


class DownloadFailure(RuntimeFailure):
    """A server or the network failed."""


class WrongDownload(InputError):
    """A server sent something other than the file."""


class ResumingDownloader:
    """Downloader for pooch that keeps a partial download in a ``.part`` file next to the destination.

    A later download of the same URL continues it if the server's file has not changed. With ``same_bytes``, a download
    of another URL continues it too; otherwise that download replaces it as soon as its first bytes arrive. The URL,
    version and total size of the partial download, and whether it is ``mixed``, are in a ``.part.json`` file.

    Args:
        part: the ``.part`` file.
        size: size in bytes that the file must have, None if unknown.
        wait: seconds to wait after the first of consecutive tries without data; twice as many after the second, three
            times after the third, and so on. After a try that received data, the next one follows at once.
        same_bytes: whether all URLs serve the same file, such as mirrors; the caller checks the result.

    Attributes:
        mixed: whether the start of the file is from another URL than the rest.
    """

    def __init__(self, part: Path, size: int | None = None, wait: float = 1.0, same_bytes: bool = False) -> None:
        self._part, self._size, self._wait, self._same_bytes = part, size, wait, same_bytes
        self.mixed = False
        self._record = part.with_name(part.name + ".json")

    def __call__(self, url: str, output_file: Any, _pooch: Any) -> None:
        """Download ``url`` to the ``.part`` file, and move that to ``output_file`` when it is complete.

        Args:
            url: http or https address.
            output_file: the file to write.
            _pooch: pooch's own object, which every downloader gets; not used.

        Raises:
            DownloadFailure: the server cannot be reached, does not have the file, or keeps closing the connection.
            WrongDownload: the server sent an HTML or XML page, or a file of another size.
            RuntimeFailure: not enough disk space.
        """
        self._part.parent.mkdir(parents=True, exist_ok=True)
        tries = 0
        while True:
            before = self._resumable_bytes(url)
            try:
                if self._resume(url, before):
                    break
                problem = "the connection was closed early"
            except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
                problem = _reason(error)
            except requests.RequestException as error:  # an invalid URL, too many redirects
                raise DownloadFailure(f"{url}: {_reason(error)}") from None
            tries = 0 if self._resumable_bytes(url) > before else tries + 1
            if tries >= _MAX_TRIES:
                raise DownloadFailure(f"{url}: {problem}")
            time.sleep(self._wait * tries)
        size = self._downloaded_bytes()
        if self._size not in (None, size):
            self._discard()
            raise self._wrong_size(url, size)
        self._record.unlink(missing_ok=True)
        os.replace(self._part, output_file)

    def _resumable_bytes(self, url: str) -> int:
        """Number of downloaded bytes that need not be downloaded again from this URL."""
        record = self._read_record()
        is_usable = record.get("url") == url or (self._same_bytes and "url" in record)
        return self._downloaded_bytes() if is_usable else 0

    def _downloaded_bytes(self) -> int:
        """Size of the partial download, whichever URL it is from."""
        return self._part.stat().st_size if self._part.exists() else 0

    def _read_record(self) -> dict[str, Any]:
        """What `_resume` wrote about the partial download; {} if there is nothing."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def _resume(self, url: str, offset: int) -> bool:
        """Request the bytes from ``offset`` and append them; False means that the file is incomplete: try again."""
        record = self._read_record()
        same_url = record.get("url") == url
        is_mixed = self.mixed or not same_url or record.get("mixed") is True  # if resumed
        headers = {"Accept-Encoding": "identity"}  # so that lengths and ranges refer to the file itself
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if same_url and isinstance(record.get("version"), str):
                headers["If-Range"] = record["version"]
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if response.status_code == 416:  # no such range: the server's file ends at `offset`, or is shorter
                if record.get("total") == offset:
                    self.mixed = is_mixed
                    return True
                if not same_url:
                    raise DownloadFailure(f"{url}: 416 {response.reason}")
                self._discard()
                return False
            if response.status_code in (429, 500, 502, 503, 504):
                raise requests.ConnectionError(f"{response.status_code} {response.reason}")
            if response.status_code not in (200, 206):
                raise DownloadFailure(f"{url}: {response.status_code} {response.reason}")
            start, total = _content_range(response)
            if start not in (0, offset):  # not the requested range: request the whole file next
                self._discard()
                return False
            chunk = response.raw.read1(_CHUNK_BYTES)  # iter_content would lose data received before a disconnection
            self._check_response(url, response, chunk if start == 0 else b"", total)
            if start > 0 and total is not None and record.get("total") not in (None, total):
                self._discard()  # the file has changed, or the two URLs serve different files
                return False
            downloaded = self._downloaded_bytes()
            # even a partial download that is discarded below frees its space
            self._check_space(url, None if total is None else total - downloaded)
            if start == 0 and downloaded:  # the server sends the whole file, which replaces the partial download
                if not chunk:  # nothing to replace it with yet
                    return False
                self._discard()
            self.mixed = start > 0 and is_mixed
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if version is not None and version.startswith("W/"):  # a weak ETag, which If-Range does not accept
                version = response.headers.get("Last-Modified")
            record = {"url": url, "version": version, "total": total, "mixed": self.mixed}
            self._record.write_text(json.dumps(record), encoding="utf-8")
            with (
                progress_bar(total, self._part.stem, "byte", initial=start, scale=True) as bar,
                self._part.open("ab") as file,
                report_disk_full(self._part, "free some space and run it again (the partial download is kept)"),
            ):
                while chunk:
                    file.write(chunk)
                    bar.update(len(chunk))
                    chunk = response.raw.read1(_CHUNK_BYTES)
        expected_size = self._size if total is None else total
        return expected_size is None or self._downloaded_bytes() >= expected_size

    def _check_response(self, url: str, response: requests.Response, first_bytes: bytes, total: int | None) -> None:
        """Raise WrongDownload if a response is an HTML or XML page, or a file of another total size.

        Args:
            url: the URL, for the message.
            response: the response.
            first_bytes: the first bytes of the file; empty if the response starts later in the file.
            total: total size of the file in bytes, None if unknown.
        """
        declared_html = response.headers.get("Content-Type", "").startswith("text/html")
        if first_bytes and (declared_html or _HTML.match(first_bytes)):
            raise WrongDownload(f"{url}: an HTML page, not the file")
        if self._size is not None and total is not None and total != self._size:
            raise self._wrong_size(url, total)

    def _wrong_size(self, url: str, size: int) -> WrongDownload:
        return WrongDownload(f"{url}: another file, of {size:,} bytes instead of {self._size:,}")

    def _check_space(self, url: str, needed: int | None) -> None:
        """Raise RuntimeFailure if the disk lacks space for ``needed`` bytes; None, if unknown, passes."""
        free = shutil.disk_usage(self._part.parent).free
        if needed is not None and free < needed + RESERVED_BYTES:
            missing = format_missing_space(needed + RESERVED_BYTES, free)
            raise RuntimeFailure(
                f"{url}: needs {missing} in {self._part.parent}; free some space and run it again (finished downloads "
                "are kept)"
            )


def download(url: str, destination: Path, checksum: str | None, size: int | None, wait: float = 1.0) -> str:
    """Download a file, and check its size and checksum.

    Args:
        url: http or https address.
        destination: the file to write; it appears when it is complete, and is removed if its checksum is wrong. If it
            exists, it is checked but not downloaded again.
        checksum: in pooch's format, "sha256:..." or "md5:..."; None if unknown.
        size: size in bytes, None if unknown.
        wait: as in `ResumingDownloader`.

    Returns:
        The SHA-256 of the file.

    Raises:
        DownloadFailure: the server or the network failed; the partial download is kept.
        WrongDownload: a web page or a file whose announced size is wrong (a partial download is kept), or a file
            whose actual size or checksum is wrong (nothing is kept).
        RuntimeFailure: not enough disk space.
    """
    part = destination.with_name(destination.name + ".part")
    # the start from one mirror and the rest from another may be joined, as the checksum of the whole file decides
    same_bytes = (checksum or "").startswith("sha256:")
    pooch.get_logger().setLevel("ERROR")
    while True:
        downloader = ResumingDownloader(part, size, wait, same_bytes)
        try:
            pooch.retrieve(
                url,
                known_hash=None,  # checked below, with a message of one line
                fname=destination.name,
                path=destination.parent,
                downloader=downloader,
            )
            return check_file(destination, url, checksum, remove=True)
        except WrongDownload:
            if not downloader.mixed:
                raise
            # the start, from another URL, may be wrong: download the whole file from this one


def check_file(path: Path, name: str, checksum: str | None, remove: bool = False) -> str:
    """Check a file against its checksum.

    Args:
        path: the file.
        name: URL or path to show in the error.
        checksum: "sha256:..." or "md5:..."; None if unknown, to check nothing.
        remove: whether to remove a file with another checksum.

    Returns:
        The SHA-256 of the file.

    Raises:
        WrongDownload: the file has another checksum.
    """
    sha256: str = pooch.file_hash(str(path), alg="sha256")
    algorithm, _, expected = (checksum or "").partition(":")
    actual = sha256 if algorithm in ("", "sha256") else pooch.file_hash(str(path), alg=algorithm)
    if expected and actual != expected:
        if remove:
            path.unlink()
        raise WrongDownload(f"{name}: checksum mismatch ({algorithm} {actual} instead of {expected})")
    return sha256


def _content_range(response: requests.Response) -> tuple[int, int | None]:
    """Offset in the file of the first byte of a response, -1 if unknown; and the size of the file, None if unknown."""
    if response.status_code == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            return -1, None
        return int(match[1]), None if match[3] == "*" else int(match[3])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _reason(error: Exception) -> str:
    """One line about a network error, without the layers that requests and urllib3 wrap around its cause."""
    inner = error.args[0] if error.args else error
    return shorten(getattr(inner, "reason", None) or inner, 160)
