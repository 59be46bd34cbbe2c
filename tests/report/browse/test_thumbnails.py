"""Thumbnails and their cache."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from refdet.data.image_decoder import SizeError, rgb_thumbnail
from refdet.report.browse.thumbnails import ByteCache


def test_the_cache_evicts_the_least_recently_used() -> None:
    cache, computed = ByteCache(100), []

    def get(key: int, size: int = 30) -> bytes:
        return cache.get(key, lambda: computed.append(key) or bytes(size))  # type: ignore[func-returns-value]

    for key in (1, 2, 3, 1, 4, 1, 2):  # 4 evicts 2, and 2 evicts 3
        get(key)
    assert computed == [1, 2, 3, 4, 2] and cache.size == 90
    assert len(get(9, 1000)) == 1000 and cache.size == 0  # larger than the cache, so it evicts all, and then itself


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_small_copy_keeps_proportions_and_colors(kind: str, mode: str) -> None:
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[:, 200:] = 255  # left half black, right half white
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    copy = np.asarray(rgb_thumbnail(out.getvalue(), side=80, height=300, width=400))
    assert copy.shape == (60, 80, 3) and copy[:, :35].max() < 30 and copy[:, 45:].min() > 225


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_small_copy_ignores_the_exif_orientation(kind: str) -> None:
    """Boxes refer to the stored pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown rotated by 90 degrees
    out = io.BytesIO()
    Image.new("RGB", (400, 300)).save(out, kind, exif=exif)
    assert rgb_thumbnail(out.getvalue(), side=80, height=300, width=400).size == (80, 60)


def test_a_16_bit_image_is_scaled_to_8_bits() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((30, 40), 0x8000, np.uint16)).save(out, "PNG")
    assert np.asarray(rgb_thumbnail(out.getvalue(), side=20, height=30, width=40)).mean() == 128


def test_an_image_of_another_size_is_an_error() -> None:
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "PNG")
    with pytest.raises(SizeError, match="is 40x30, but the store says 30x40"):
        rgb_thumbnail(out.getvalue(), side=20, height=40, width=30)
