"""Browser tests: an installed Chromium under playwright's control, and pages whose errors and requests are recorded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str:
    """Path of the browser; skips the test if the browser or playwright is missing.

    With REFDET_REQUIRE_BROWSER=1 the test fails instead.
    """
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    missing = [] if path else ["chromium (apt-get install chromium)"]
    for name, package in (("playwright", "playwright"), ("axe_playwright_python", "axe-playwright-python")):
        try:
            __import__(name)
        except ImportError:
            missing.append(f"{package} (pip install 'refdet[browser-tests]')")
    if missing:
        stop = pytest.fail if os.environ.get("REFDET_REQUIRE_BROWSER") == "1" else pytest.skip
        stop(f"no browser test: {' and '.join(missing)} missing")
    return str(path)


@contextmanager
def serve_browse(*arguments: str | Path) -> Iterator[str]:
    """Run refdet browse with these arguments, yielding the address that it prints."""
    command = [sys.executable, "-m", "refdet", "browse", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            yield address
        finally:
            process.terminate()


def accessibility_violations(page: Any) -> list[str]:
    """Violations of axe's accessibility rules, such as contrast and labels."""
    from axe_playwright_python.sync_playwright import Axe

    # adds its script through the browser's debugger, which the page's content security policy does not stop
    violations = Axe().run(page).response["violations"]
    return [f"{violation['id']}: {node['html'][:200]}" for violation in violations for node in violation["nodes"]]


class WatchedPage:
    """A page whose errors and requests are recorded.

    Attributes:
        page: playwright's page.
        address: the address that `refdet browse` printed, which ends in ?token=..., "" if unknown.
        errors: errors and warnings of the console, and uncaught exceptions.
        requests: requested addresses.
    """

    def __init__(self, page: Any, address: str = "") -> None:
        self.page, self.address = page, address
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, address: str) -> None:
        """Go to an address and wait until its view is shown."""
        self.page.goto(address)
        self.page.wait_for_selector("#main[data-ready]")

    def open_with(self, query: str) -> None:
        """Go to the server's address with a further query, such as "image=1&ref=0"."""
        self.open(self.address.replace("?", f"?{query}&"))

    def act_and_wait(self, act: Callable[[], object]) -> None:
        """Call a function that changes the view, and wait until the new one is shown."""
        # the page counts the views that it has shown in data-ready
        before = self.page.get_attribute("#main", "data-ready")
        act()
        self.page.wait_for_function("before => document.getElementById('main').dataset.ready !== before", arg=before)

    def wait_for_index(self) -> None:
        """Wait until all regions have been indexed."""
        # the stage is "" when all is indexed
        self.page.wait_for_function("async () => (await (await fetch('api/status')).json()).index.stage === ''")
        self.page.reload()
        self.page.wait_for_selector("#main[data-ready]")
