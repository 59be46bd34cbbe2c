"""Access control of the `refdet browse` server: token, cookie, host names, methods; and its address and options."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluate_examples import regions, write_store

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from refdet.cli.main import main  # noqa: E402
from refdet.errors import InputError  # noqa: E402
from refdet.report.browse.server import accepted_hosts, listen  # noqa: E402

Address = tuple[int, str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """Port and token of a running `refdet browse`, which must exit with 0 and without output on Ctrl-C."""
    store = tmp_path_factory.mktemp("browse") / "s.h5"
    write_store(store, [regions(1, [[0, 0, 9, 9]])], masks=False)
    command = [sys.executable, "-m", "refdet", "browse", str(store), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32})\n", process.stdout.readline())
        assert found, process.stderr.read()
        yield int(found[1]), found[2]
        process.send_signal(signal.SIGINT)
        assert (process.wait(30), process.stderr.read()) == (0, "")


def request(
    server: Address, path: str = "/", host: str | None = None, cookie: str | None = None, method: str = "GET"
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", server[0], timeout=30)
    headers = {"Host": host or f"127.0.0.1:{server[0]}"} | ({"Cookie": cookie} if cookie else {})
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


def test_the_token_sets_a_cookie_that_gives_access(server: Address) -> None:
    status, headers, _ = request(server, f"/?token={server[1]}")
    cookie = headers["Set-Cookie"]
    assert status == 200 and "SameSite=Strict" in cookie and "HttpOnly" in cookie
    folder, pair = re.search(r"Path=(/[\w-]{16})/;", cookie)[1], cookie.split(";")[0]
    assert request(server, f"{folder}/api/about", cookie=pair)[0] == 200
    assert request(server, f"{folder}/", cookie=pair)[2].count(f'"{folder}/static/'.encode()) == 3


def test_the_cookie_is_limited_to_an_unguessable_path(server: Address) -> None:
    """Browsers send a cookie to every port of a host, but only with requests below its path."""
    responses = [request(server, f"/?token={server[1]}") for _ in range(2)]
    folder = re.search(r"Path=([^;]*)/;", responses[0][1]["Set-Cookie"])[1]
    assert len(folder) > 16 and responses[0][1]["Set-Cookie"] == responses[1][1]["Set-Cookie"]
    pair = responses[0][1]["Set-Cookie"].split(";")[0]
    for path in ("/", "/api/about", f"{folder}x/api/about", folder):
        assert request(server, path, cookie=pair)[0] == 403
    for path in (f"{folder}/api/about", f"{folder}/"):
        assert request(server, path)[0] == 403
    assert request(server, f"/api/about?token={server[1]}")[0] == 200


@pytest.mark.parametrize("path", ["/", "/api/about", "/api/image/1", "/static/main.js", "/no/such/page"])
def test_nothing_is_served_without_the_token(server: Address, path: str) -> None:
    token = server[1]
    for cookie in (None, "refdet-browse=x", f"refdet-browse={token}", f"other={token}", "=;;", 'a="\\'):
        status, headers, body = request(server, path, cookie=cookie)
        assert status == 403 and "Set-Cookie" not in headers and b"token" in body
    for wrong in (token[:-1], token + "x", "", "%00", "é".encode().hex()):
        assert request(server, f"{path}?token={wrong}")[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{}"])
def test_other_host_names_are_refused(server: Address, host: str) -> None:
    status, headers, _ = request(server, f"/?token={server[1]}", host=host.format(server[0]))
    assert status == 400 and "Set-Cookie" not in headers


def test_localhost_is_an_accepted_host_name(server: Address) -> None:
    assert request(server, f"/?token={server[1]}", host=f"LOCALHOST:{server[0]}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_methods_other_than_get_are_refused(server: Address, method: str) -> None:
    assert request(server, f"/?token={server[1]}", method=method)[0] == 405


def test_every_response_has_security_headers(server: Address) -> None:
    for path in (f"/?token={server[1]}", "/", f"/api/items?sort=x&token={server[1]}"):
        _, headers, _ = request(server, path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert headers["Cache-Control"] == "no-store" and "server" not in headers


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"`port` {port}: cannot listen .*in use"):
            listen("127.0.0.1", port)


def test_without_a_port_the_next_free_one_is_taken() -> None:
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        assert first.getsockname()[1] != second.getsockname()[1]


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0)


def test_accepted_hosts_of_local_and_public_addresses() -> None:
    assert accepted_hosts("127.0.0.1", "127.0.0.1") == () and accepted_hosts("::1", "[::1]") == ()
    assert accepted_hosts("10.0.0.5", "10.0.0.5") == ("10.0.0.5",) and socket.gethostname() in accepted_hosts(
        "0.0.0.0", "0.0.0.0"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["missing.h5"], "STORE missing.h5: no such file"),
        (["a.h5", "b.h5", "c.h5"], "3 stores; give one, or two"),
        (["{store}", "--images", "missing"], "--images missing"),
        (["{store}", "--predictions", "missing.json"], "--predictions missing.json"),
        (["{store}", "--port", "0", "--dataset", "refcoco"], "--refer-root"),
        (["{store}", "--box-format", "xyxy"], "--box-format xyxy is for --predictions"),
    ],
)
def test_invalid_input_is_one_error_line(tmp_path: Path, arguments: list[str], problem: str) -> None:
    write_store(tmp_path / "s.h5", [regions(1, [])], masks=False)
    done = CliRunner().invoke(main, ["browse", *(word.format(store=tmp_path / "s.h5") for word in arguments)])
    assert done.exit_code == 2 and problem in done.stderr and done.stderr.count("\n") == 1


def test_without_the_server_packages_the_error_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "s.h5", [regions(1, [])], masks=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["browse", str(tmp_path / "s.h5")])
    assert done.exit_code == 2 and "pip install 'refdet[browse]'" in done.stderr
