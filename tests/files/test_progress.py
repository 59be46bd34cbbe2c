from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

import pytest

from refdet.files import progress as module
from refdet.files.progress import progress, progress_bar


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_short_work_writes_nothing_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(100, "train", "step") as bar:
        for _ in range(100):
            bar.update()
            bar.set_postfix_str("loss 1", refresh=False)
    assert list(progress(range(50), "export", "image")) == list(range(50))
    assert stream.getvalue() == ""


def test_long_work_writes_a_line_per_interval_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), 0.0
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(1000, "train", "step") as bar:
        monkeypatch.setattr(bar, "_time", lambda: bar.start_t + now)
        for _ in range(1000):  # 0.1 s each
            now += 0.1
            bar.set_postfix_str("loss 1.00", refresh=False)
            bar.update()
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 100 / module.LINE_INTERVAL  # 1000 steps take 100 s
    assert "\r" not in stream.getvalue()
    for line in lines:
        assert line.startswith("train: ") and " of 1000 steps, " in line and "loss 1.00" in line


def test_nested_bars_write_no_escape_sequences_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(2, "train", "step") as outer:
        for _ in range(2):
            with progress_bar(3, "validate", "image", leave=False) as inner:
                inner.update(3)
                inner.refresh()
            outer.update()
        with progress_bar(1, "extract", "image", leave=False) as single:
            single.update()
            single.refresh()
    assert "\x1b" not in stream.getvalue() and "validate: 3 of 3 images" in stream.getvalue()
    assert "extract: 1 of 1 image," in stream.getvalue()


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(3, "train", "step") as bar:
        bar.update(3)
    assert "train: 100%" in stream.getvalue() and "\r" in stream.getvalue()


def test_without_stderr_the_items_are_still_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress([1, 2], "export", "image", total=2)) == [1, 2]


def test_work_goes_on_when_the_reader_of_its_log_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "LINE_INTERVAL", 0)
    with progress_bar(10, "train", "step") as bar:
        bar.update()
        assert b"train: " in os.read(reader, 10_000)
        os.close(reader)
        for _ in range(9):
            bar.refresh()
            bar.update()
    assert bar.n == 10
    with suppress(BrokenPipeError):
        stream.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_work_goes_on_when_the_disk_of_its_log_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "LINE_INTERVAL", 0)
    with progress_bar(10, "train", "step") as bar:
        for _ in range(10):
            bar.refresh()
            bar.update()
    assert bar.n == 10
    with suppress(OSError):
        stream.close()
