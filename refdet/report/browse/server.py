"""The server of ``refdet browse``. Needs ``pip install refdet[browse]``."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from refdet.errors import ArgumentError, InputError, RefdetError
from refdet.report.browse import views
from refdet.report.browse.collection import Collection
from refdet.report.browse.coverage import Indexer
from refdet.report.browse.guard import LOOPBACK, Guard
from refdet.report.browse.queries import Filter, ListPage, parse_id
from refdet.report.browse.thumbnails import ByteCache, full_image, thumbnail

log = logging.getLogger(__name__)

FIRST_PORT = 8765
_MAX_PORTS = 50  # ports to try, from `FIRST_PORT` on
_BACKLOG = 128  # connections that may wait to be accepted
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# The browser may keep images for a day: another server has other addresses, as `Guard.folder` is random.
_CACHED = {"Cache-Control": "private, max-age=86400"}


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII, as strings from files may have characters that UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        """The JSON, with characters beyond ASCII escaped."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Handlers:
    """The handlers of all requests.

    Args:
        collection: what to show.
        indexer: completes the catalog in the background.
    """

    def __init__(self, collection: Collection, indexer: Indexer) -> None:
        self.collection, self.indexer = collection, indexer
        self.thumbnails = ByteCache()
        folder = resources.files("refdet.report.browse") / "static"
        self.static = {
            entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in _TYPES
        }

    def app(self) -> Starlette:
        """The application, without its `Guard`."""
        handlers: dict[str, Callable[[Request], Response]] = {
            "/": self.page,
            "/static/{name}": self.file,
            "/api/about": self.about,
            "/api/status": self.status,
            "/api/items": self.items,
            "/api/image/{image_id}": self.image,
            "/api/list.json": self.list,
            "/thumbnail/{position:int}": self.thumbnail,
            "/image/{position:int}": self.picture,
        }
        routes = [Route(path, self._with_priority(handle), methods=["GET"]) for path, handle in handlers.items()]
        exception_handlers: dict[Any, Any] = {RefdetError: _handle_refdet_error, Exception: _handle_unexpected_error}
        return Starlette(routes=routes, exception_handlers=exception_handlers)

    def _with_priority(self, handle: Callable[[Request], Response]) -> Callable[[Request], Response]:
        """Make the indexer pause for a request, unless it is for the status, which the page requests every second."""

        def handle_with_priority(request: Request) -> Response:
            if handle != self.status:
                self.indexer.pause_for_request()
            return handle(request)

        return handle_with_priority

    def page(self, request: Request) -> Response:
        """The HTML of the page, the same for every view.

        Only the scripts and styles that it names need the folder of the server; the scripts take it from their own URL.
        """
        prefix = request.scope["root_path"].encode()
        return Response(
            self.static["page.html"].replace(b'"static/', b'"' + prefix + b"/static/"), media_type="text/html"
        )

    def file(self, request: Request) -> Response:
        """A script, style or icon of the page."""
        name = request.path_params["name"]
        if name not in self.static:
            return PlainTextResponse("no such file\n", 404)
        return Response(self.static[name], media_type=_TYPES[Path(name).suffix])

    def about(self, request: Request) -> Response:
        """What the collection contains, for the controls of the page."""
        return AsciiJSONResponse({**views.about(self.collection), **self._status()})

    def status(self, request: Request) -> Response:
        """Progress of the indexer, and the stores that have changed."""
        return AsciiJSONResponse(self._status())

    def items(self, request: Request) -> Response:
        """A page of a list."""
        params = request.query_params
        return AsciiJSONResponse(views.items(self.collection, Filter.parse(params), ListPage.parse(params)))

    def image(self, request: Request) -> Response:
        """The details of one image, by its id."""
        return AsciiJSONResponse(
            views.image_details(self.collection, parse_id("image", request.path_params["image_id"]))
        )

    def list(self, request: Request) -> Response:
        """A whole list, as a file to download."""
        entries = views.whole_list(self.collection, Filter.parse(request.query_params))
        return AsciiJSONResponse(entries, headers={"Content-Disposition": 'attachment; filename="refdet-list.json"'})

    def thumbnail(self, request: Request) -> Response:
        """The thumbnail of an image, by its position."""
        position = self._position(request)
        source = self.collection.source
        if source is None:
            return PlainTextResponse("no images were given\n", 404)
        jpeg = self.thumbnails.get(position, lambda: thumbnail(source, self.collection.record(position)))
        return Response(jpeg, media_type="image/jpeg", headers=_CACHED)

    def picture(self, request: Request) -> Response:
        """An image at full size, by its position."""
        position = self._position(request)
        if self.collection.source is None:
            return PlainTextResponse("no images were given\n", 404)
        jpeg = full_image(self.collection.source, self.collection.record(position))
        return Response(jpeg, media_type="image/jpeg", headers=_CACHED)

    def _position(self, request: Request) -> int:
        """The position in a request's path; ArgumentError if the first store has no image there."""
        position: int = request.path_params["position"]
        if not 0 <= position < len(self.collection.stores[0]):
            raise ArgumentError("position", f"no image at position {position}")
        return position

    def _status(self) -> dict[str, Any]:
        return {"index": self.indexer.status(), "changed": self.collection.changed()}


def listen(host: str, port: int | None) -> socket.socket:
    """Open a listening socket.

    Args:
        host: the name or address to listen on.
        port: the port; 0 for any free port; None for `FIRST_PORT` or the next free port.

    Raises:
        InputError: the port is in use, or this machine has no such address.
    """
    ports = range(FIRST_PORT, FIRST_PORT + _MAX_PORTS) if port is None else (port,)
    last_error = OSError()
    for candidate in ports:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise InputError(
                f"`host` {host}: {error.strerror or error}; give a name or address of this machine"
            ) from None
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            last_error = error
        else:
            return listener
    where = f"`port` {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    raise InputError(
        f"{where}: cannot listen on {host} ({last_error.strerror or last_error}); give another `port`, or 0 for any"
    )


def serve(
    collection: Collection, listener: socket.socket, host: str, token: str, announce: Callable[[str], None]
) -> None:
    """Serve the page until interrupted.

    Args:
        collection: what to show; closed at the end.
        listener: a listening socket.
        host: the name or address that the socket listens on.
        token: the token that `Guard` asks for.
        announce: called with the URL to open, before the server starts.
    """
    port = int(listener.getsockname()[1])
    indexer = Indexer(collection)
    name = f"[{host}]" if ":" in host else host
    guarded = Guard(Handlers(collection, indexer).app(), token, port, accepted_hosts(host, name))
    config = uvicorn.Config(
        guarded, log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none", lifespan="off",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    indexer.start()
    announce(f"http://{name}:{port}/?token={quote(token)}")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # the normal way to stop; uvicorn raises it again after shutting down
        pass
    finally:
        indexer.stop()
        collection.close()


def accepted_hosts(host: str, name: str) -> tuple[str, ...]:
    """The names in Host headers to accept besides the loopback ones.

    Args:
        host: the name or address that the server listens on.
        name: the host as written in a URL, where IPv6 addresses are in brackets.
    """
    if host in ("0.0.0.0", "::"):  # every address of the machine
        return (name, socket.gethostname(), socket.getfqdn())
    return () if name in LOOPBACK else (name,)


async def _handle_refdet_error(request: Request, error: Exception) -> Response:
    """The response for an invalid request or file; the page shows its message."""
    code = 400 if isinstance(error, ArgumentError) else 422 if isinstance(error, InputError) else 500
    return AsciiJSONResponse({"error": str(error)}, code)


async def _handle_unexpected_error(request: Request, error: Exception) -> Response:
    log.error("error: unexpected %s: %s", type(error).__name__, error)
    return AsciiJSONResponse({"error": f"unexpected {type(error).__name__}: {error}"}, 500)
