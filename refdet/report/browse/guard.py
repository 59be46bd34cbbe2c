"""`Guard`: decides which requests the server answers.

The page is for the user who started the program. Other users of the machine lack the token; other pages in the user's
browser can send requests but lack the cookie (SameSite=Strict); a foreign host name that resolves to this machine
(DNS rebinding) is not in the list of hosts. A cookie is sent to every port of an address, so another server on this
machine could ask for it: therefore all paths of the page begin with a random folder, and the cookie is for that folder
only.
"""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "refdet-browse"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def new_token() -> str:
    """A token of 192 bits."""
    return secrets.token_urlsafe(24)


class Guard:
    """ASGI middleware that answers only GET and HEAD requests with the token, for a known host.

    The printed address has the token in its query; the response to it sets a cookie, which later requests carry.
    Requests with the cookie must be for paths in `folder`, the application's ``root_path``; requests with the token in
    the query may also leave `folder` out of the path.

    Args:
        app: the application.
        token: the token.
        port: the port of the server.
        hosts: names and addresses by which the server may be reached, besides the loopback ones.

    Attributes:
        folder: "/" and random characters, with which the paths of this server begin.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, hosts: tuple[str, ...] = ()) -> None:
        self.app, self.token = app, token
        self.folder = "/" + secrets.token_urlsafe(12)
        names = [name.lower() for name in (*LOOPBACK, *hosts)]
        self.hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket
            await send({"type": "websocket.close", "code": 1008})  # "policy violation"
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        query_token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        has_query_token = self._is_token(query_token)
        refusal = self._refusal(scope, headers, has_query_token)
        path = scope["path"] if self._is_in_folder(scope["path"]) else self.folder + scope["path"]
        inner = {**scope, "path": path, "root_path": self.folder}

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out.update(_HEADERS)
                out.setdefault("Cache-Control", "no-store")
                if has_query_token and refusal is None:
                    where = f"Path={self.folder}/; HttpOnly; SameSite=Strict"
                    out.append("Set-Cookie", f"{COOKIE}={self.token}; {where}")
            await send(message)

        await (self.app if refusal is None else refusal)(inner, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: dict[bytes, str], has_query_token: bool) -> Response | None:
        """The response that refuses a request, None if the request is accepted."""
        host = headers.get(b"host", "").lower()
        if host not in self.hosts:
            return PlainTextResponse("Unknown host name; open the address that refdet browse printed.\n", 400)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("Only GET requests are answered.\n", 405, {"Allow": "GET, HEAD"})
        cookie = self._read_cookie(headers.get(b"cookie", ""))
        if not has_query_token and not (self._is_in_folder(scope["path"]) and self._is_token(cookie)):
            return PlainTextResponse(
                "Wrong or missing token; open the whole address that refdet browse printed, with its ?token=...\n", 403
            )
        return None

    def _is_in_folder(self, path: str) -> bool:
        return path.startswith(f"{self.folder}/")

    def _is_token(self, text: str) -> bool:
        """Whether a text is the token; the time it takes does not depend on how much of it is right."""
        return hmac.compare_digest(text.encode(), self.token.encode())

    def _read_cookie(self, header: str) -> str:
        """The value of this server's cookie in a Cookie header, "" if there is none."""
        try:
            cookie = SimpleCookie(header).get(COOKIE)
        except CookieError:
            return ""
        return "" if cookie is None else cookie.value
