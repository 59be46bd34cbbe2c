"""Small copies of images, and the memory that keeps them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from refdet.data.image_decoder import SizeError, rgb_thumbnail
from refdet.report.browse.thumbnails import ByteCache


def test_the_cache_keeps_what_was_used_last_within_its_limit() -> None:
    cache, made = ByteCache(100), []

    def get(key: int, size: int = 30) -> bytes:
        return cache.get(key, lambda: made.append(key) or bytes(size))  # type: ignore[func-returns-value]

    for key in (1, 2, 3, 1, 4, 1, 2):  # 4 drives out 2, and 2 drives out 3
        get(key)
    assert made == [1, 2, 3, 4, 2] and cache.size == 90
    assert len(get(9, 1000)) == 1000 and cache.size == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_small_copy_has_the_proportions_and_colors(kind: str, mode: str) -> None:
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[:, 200:] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    copy = np.asarray(rgb_thumbnail(out.getvalue(), 80, 300, 400))
    assert copy.shape == (60, 80, 3) and copy[:, :35].max() < 30 and copy[:, 45:].min() > 225


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_small_copy_is_not_turned_as_boxes_are_of_the_stored_pixels(kind: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    out = io.BytesIO()
    Image.new("RGB", (400, 300)).save(out, kind, exif=exif)
    assert rgb_thumbnail(out.getvalue(), 80, 300, 400).size == (80, 60)


def test_sixteen_bits_become_eight() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((30, 40), 0x8000, np.uint16)).save(out, "PNG")
    assert np.asarray(rgb_thumbnail(out.getvalue(), 20, 30, 40)).mean() == 128


def test_an_image_of_another_size_is_not_decoded() -> None:
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "PNG")
    with pytest.raises(SizeError, match="is 40x30, but the store says 30x40"):
        rgb_thumbnail(out.getvalue(), 20, 40, 30)
