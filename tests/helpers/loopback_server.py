"""An HTTP server on the loopback interface whose responses fail as downloads do in practice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ServedFile:
    """A file and how it is served; requests are recorded.

    Attributes:
        data: its contents.
        cuts: number of bytes after which each of the first responses is cut short; later ones are complete.
        status: status of the response; other than 200, it has no content.
        location: target of a redirect.
        kind: Content-Type.
        etag: ETag, "" for none.
        ranges: whether ranges are served.
        lengths: whether responses have a Content-Length.
        requests: Range headers of the requests, "" for none.
    """

    data: bytes
    cuts: list[int] = field(default_factory=list)
    status: int = 200
    location: str = ""
    kind: str = "application/zip"
    etag: str = '"1"'
    ranges: bool = True
    lengths: bool = True
    requests: list[str] = field(default_factory=list)


class Site:
    """The files of a server, by path."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.files: dict[str, ServedFile] = {}

    def add(self, path: str, data: bytes = b"", **how: object) -> ServedFile:
        self.files[path] = ServedFile(data, **how)  # type: ignore[arg-type]
        return self.files[path]


@contextmanager
def serving() -> Iterator[Site]:
    """Serve a site until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def end_headers(self) -> None:
            self.send_header("Connection", "close")
            super().end_headers()

        def do_GET(self) -> None:
            file = site.files.get(self.path)
            if file is None:
                self.send_error(404)
                return
            requested = self.headers.get("Range", "")
            file.requests.append(requested)
            if file.status != 200:
                self.send_response(file.status)
                if file.location:
                    self.send_header("Location", file.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(requested[len("bytes=") : -1]) if requested and file.ranges else 0
            if self.headers.get("If-Range", file.etag) != file.etag:
                start = 0
            if start and start >= len(file.data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(file.data) - 1}/{len(file.data)}")
            if file.lengths:
                self.send_header("Content-Length", str(len(file.data) - start))
            self.send_header("Content-Type", file.kind)
            if file.etag:
                self.send_header("ETag", file.etag)
            self.end_headers()
            end = file.cuts.pop(0) if file.cuts else len(file.data)
            self.wfile.write(file.data[start:end])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
