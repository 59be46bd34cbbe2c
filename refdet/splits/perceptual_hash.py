"""Find files that show the same picture by a perceptual hash, confirmed by correlation.

The hash is the DCT hash known as pHash (Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010), with 143 bits instead of 64: the 12x12 lowest frequencies of a 32x32 gray thumbnail, without the
mean, thresholded at their median. Between two different pictures about half of the bits differ (71.5, standard
deviation 6), between a picture and its resized or recompressed copy at most a dozen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refdet.data import image_decoder

SIDE = 32  # of a thumbnail, in pixels
FREQUENCIES = 12  # of the DCT, in each direction
BITS = FREQUENCIES * FREQUENCIES - 1
# Measured on 159 COCO images; docs/refer.md lists what these thresholds find and miss.
MAX_HAMMING_DISTANCE = 28
MIN_CORRELATION = 0.8
_ROWS_AT_ONCE = 2048  # rows of the first set to compare at once: distances to 7000 others take 57 MB


class Match(NamedTuple):
    """Two pictures that are the same.

    Attributes:
        first: row in the first set.
        second: row in the second set.
        hamming_distance: number of the 143 hash bits that differ.
        correlation: of the thumbnails, 1 for identical up to brightness and contrast.
        mirrored: whether one is the other flipped left to right.
    """

    first: int
    second: int
    hamming_distance: int
    correlation: float
    mirrored: bool


def thumbnails(data: bytes) -> list[np.ndarray]:
    """Decode an image file to a (32, 32) uint8 gray thumbnail, with a second one rotated by its EXIF orientation."""
    return image_decoder.gray_thumbnails(data, SIDE)


def hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hash (N, 32, 32) thumbnails to (N, 143) float32 of 1 and -1, whose dot products give Hamming distances."""
    basis = _dct()
    low = (basis @ thumbnails.astype(np.float32) @ basis.T).reshape(len(thumbnails), -1)[:, 1:]
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32)


def matches(first: np.ndarray, second: np.ndarray) -> list[Match]:
    """Find pairs of thumbnails that show the same picture, mirrored or not.

    A picture of a single color matches nothing.

    Args:
        first: (N, 32, 32) uint8 gray thumbnails.
        second: (M, 32, 32) uint8 gray thumbnails.

    Returns:
        The matches, ordered by rows.
    """
    if not len(first) or not len(second):
        return []
    first_hashes, first_normalized = hashes(first), _normalize(first)
    found = []
    for mirrored in (False, True):
        second_images = second[:, :, ::-1] if mirrored else second
        second_hashes, second_normalized = hashes(second_images), _normalize(second_images)
        for start in range(0, len(first_hashes), _ROWS_AT_ONCE):
            distances = (BITS - first_hashes[start : start + _ROWS_AT_ONCE] @ second_hashes.T) / 2
            for row, column in np.argwhere(distances <= MAX_HAMMING_DISTANCE).tolist():
                correlation = float(first_normalized[start + row] @ second_normalized[column])
                if correlation >= MIN_CORRELATION:
                    found.append(Match(start + row, column, int(distances[row, column]), correlation, mirrored))
    return sorted(found)


def _dct() -> np.ndarray:
    """The 12 lowest of the 32 DCT-II basis functions, (12, 32) float32."""
    frequency, position = np.arange(FREQUENCIES)[:, None], np.arange(SIDE)
    return np.cos(np.pi * (2 * position + 1) * frequency / (2 * SIDE)).astype(np.float32)


def _normalize(thumbnails: np.ndarray) -> np.ndarray:
    """Flatten (N, 32, 32) to (N, 1024) float32 of mean 0 and norm 1, or all 0 for a single color."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    # a single gray level differs from its mean by rounding only
    return flat / np.where(norm > 1e-3, norm, np.inf).astype(np.float32)
