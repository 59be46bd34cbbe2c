"""CRC-32, by ISA-L if it is installed, which takes a tenth of zlib's time and returns the same value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

try:
    from isal import isal_zlib as _fastest
except ImportError:  # no wheel for this platform
    import zlib as _fastest  # type: ignore[no-redef]

crc32 = _fastest.crc32
_combine: Callable[[int, int, int], int] | None = getattr(_fastest, "crc32_combine", None)  # in newer isal only

__all__ = ["crc32", "crc32_of_parts"]


def crc32_of_parts(parts: Sequence[bytes | memoryview], part_crcs: Sequence[int]) -> int:
    """CRC-32 of concatenated parts, given the CRC-32 of each; with a new ISA-L, the parts are not read again.

    Args:
        parts: bytes, or memoryviews of bytes.
        part_crcs: CRC-32 of each part.
    """
    crc = 0
    for part, part_crc in zip(parts, part_crcs, strict=True):
        crc = crc32(part, crc) if _combine is None else _combine(crc, part_crc, len(part))
    return crc
