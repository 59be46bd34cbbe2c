"""`write_buffers` writes everything, however few bytes or buffers a system call accepts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from refdet.files.buffers import write_buffers

BUFFERS = [b"", b"abc", bytearray(b"defg"), memoryview(b"h"), b"", *[bytes([i % 256]) for i in range(1500)]]


@pytest.mark.parametrize("offset", [None, 7])
@pytest.mark.parametrize("bytes_per_call", [1, 5, 10**6])
def test_all_buffers_are_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int | None, bytes_per_call: int
) -> None:
    def writev(file: int, buffers: list[memoryview]) -> int:
        return os.write(file, b"".join(buffers)[:bytes_per_call])

    def pwritev(file: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwrite(file, b"".join(buffers)[:bytes_per_call], offset)

    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(os, "pwritev", pwritev)
    with (tmp_path / "a").open("wb", 0) as file:
        assert write_buffers(file.fileno(), BUFFERS, offset) == sum(map(len, BUFFERS))
    assert (tmp_path / "a").read_bytes() == bytes(offset or 0) + b"".join(BUFFERS)


def test_buffers_of_larger_elements_are_counted_in_bytes(tmp_path: Path) -> None:
    arrays = [np.arange(24, dtype=np.float64).reshape(2, 3, 4), np.zeros((2, 0), np.float32), np.array(5, np.int32)]
    with (tmp_path / "a").open("wb", 0) as file:
        assert write_buffers(file.fileno(), [values.data for values in arrays]) == 24 * 8 + 4
    assert (tmp_path / "a").read_bytes() == b"".join(values.tobytes() for values in arrays)


def test_more_buffers_than_one_system_call_accepts_are_written(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb", 0) as file:
        write_buffers(file.fileno(), BUFFERS)
        write_buffers(file.fileno(), BUFFERS, 3)
    whole = b"".join(BUFFERS)
    assert (tmp_path / "a").read_bytes() == whole[:3] + whole
