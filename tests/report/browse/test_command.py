"""`refdet browse` on the command line: the note about a page that the network can reach."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluate_examples import regions, write_store

from refdet.cli.main import main

pytest.importorskip("starlette")
server = pytest.importorskip("refdet.report.browse.server")

NOTE = "the network can reach this page"


@pytest.mark.parametrize(
    ("host", "is_reachable"), [("127.0.0.1", False), ("127.0.0.2", False), ("localhost", False), ("0.0.0.0", True)]
)
def test_a_page_on_a_loopback_address_is_not_said_to_be_reachable(
    host: str, is_reachable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.h5"
    write_store(store, [regions(1, [])], masks=False)
    monkeypatch.setattr(server, "serve", lambda collection, *_: collection.close())
    result = CliRunner().invoke(main, ["browse", str(store), "--host", host, "--port", "0"])
    assert result.exit_code == 0, result.stderr
    assert (NOTE in result.stderr) == is_reachable
