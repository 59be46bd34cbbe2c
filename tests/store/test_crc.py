"""The CRC-32 of concatenated parts, combined from their CRCs, with ISA-L and without."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refdet.store import crc


@pytest.mark.parametrize("combine", [crc._combine, None], ids=["fastest", "zlib"])
@given(parts=st.lists(st.binary(max_size=40), max_size=5))
def test_the_crc_of_parts_is_the_crc_of_their_concatenation(
    combine: Callable[[int, int, int], int] | None, parts: list[bytes]
) -> None:
    whole, views = b"".join(parts), [memoryview(part) for part in parts]
    assert crc.crc32(whole) == zlib.crc32(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crc, "_combine", combine)
        sums: list[Any] = [zlib.crc32(part) for part in parts]
        assert crc.crc32_of_parts(views, sums) == zlib.crc32(whole)
