"""Whether two files show the same picture: a perceptual hash, and a comparison that confirms what it finds.

The hash is the DCT one that is known as pHash (Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010), with 143 bits instead of 64: a grey thumbnail of 32x32, its 12x12 lowest frequencies without
the mean, each above their median or not. Of two different pictures half of the bits differ (71.5, standard
deviation 6); of a resized or recompressed copy a dozen at most.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refdet.data import image_decoder

SIDE = 32
LOW = 12
BITS = LOW * LOW - 1
# Measured on 159 COCO images; docs/refer.md says what these find and what they do not.
MOST_BITS = 28
LEAST_CORRELATION = 0.8
_ROWS = 2048  # of the first set compared at once: 2048 x 7000 float32 are 57 MB


class Match(NamedTuple):
    """Two pictures that are the same.

    Attributes:
        first, second: rows in the two sets.
        hamming_distance: how many of the 143 hamming_distance differ.
        correlation: of the thumbnails, 1 for the same up to brightness and contrast.
        mirrored: whether one is the other mirrored left to right.
    """

    first: int
    second: int
    hamming_distance: int
    correlation: float
    mirrored: bool


def thumbnails(data: bytes) -> list[np.ndarray]:
    """The picture in an image file as (32, 32) uint8 grey; twice where its EXIF says that it should be turned.

    See `refdet.data.image_decoder.thumbnails`.
    """
    return image_decoder.thumbnails(data, SIDE)


def hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(N, 32, 32) thumbnails -> (N, 143) float32 of 1 and -1."""
    waves = _dct()
    low = (waves @ thumbnails.astype(np.float32) @ waves.T).reshape(len(thumbnails), -1)[:, 1:]
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32)


def matches(first: np.ndarray, second: np.ndarray) -> list[Match]:
    """The pairs of thumbnails that show the same picture, mirrored or not, ordered by rows.

    A picture of one colour matches nothing: there is nothing to know it by.

    Args:
        first: (N, 32, 32) uint8.
        second: (M, 32, 32) uint8.
    """
    if not len(first) or not len(second):
        return []
    own, flat = hashes(first), _normalised(first)
    found = []
    for mirrored in (False, True):
        others = second[:, :, ::-1] if mirrored else second
        other_hashes, other_flat = hashes(others), _normalised(others)
        for start in range(0, len(own), _ROWS):
            differ = (BITS - own[start : start + _ROWS] @ other_hashes.T) / 2
            for row, column in np.argwhere(differ <= MOST_BITS).tolist():
                correlation = float(flat[start + row] @ other_flat[column])
                if correlation >= LEAST_CORRELATION:
                    found.append(Match(start + row, column, int(differ[row, column]), correlation, mirrored))
    return sorted(found)


def _dct() -> np.ndarray:
    """The first 12 of the 32 waves of DCT-II, (12, 32)."""
    wave, place = np.arange(LOW)[:, None], np.arange(SIDE)
    return np.cos(np.pi * (2 * place + 1) * wave / (2 * SIDE)).astype(np.float32)


def _normalised(thumbnails: np.ndarray) -> np.ndarray:
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.sqrt((flat * flat).sum(axis=1, keepdims=True))
    return flat / np.where(length > 1e-3, length, np.inf).astype(np.float32)
