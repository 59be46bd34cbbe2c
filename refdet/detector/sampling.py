"""Random samples of anchors and RoIs for the losses, for a whole batch at once and without waiting for a GPU.

Shape shorthand in this module:

    B: images in the batch
    N: candidates of an image, anchors or RoIs
    S: samples of an image
    T: the first candidates of a random order, min(S, N)

The random numbers are hashes of a seed per image and the index of a candidate, so a sample depends neither on the
device nor on the rest of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refdet.detector.target_assignment import NEGATIVE, POSITIVE

# Steele et al., "Fast splittable pseudorandom number generators" (2014): the increment and the factors of splitmix64
_INCREMENT, _FACTORS = 0x9E3779B97F4A7C15 - 2**64, (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)
_BITS = 62  # of a random number, so that it is never negative


@dataclass(frozen=True)
class Samples:
    """Sampled candidates of each image, positives first.

    Attributes:
        index: (B, S) int64 of the candidates.
        positive: (B, S) bool, whether it is a positive.
        valid: (B, S) bool, False where an image has fewer than S.
    """

    index: Tensor
    positive: Tensor
    valid: Tensor


def image_seeds(images: int, uses: int, generator: torch.Generator | None) -> Tensor:
    """Random seeds (uses, images) int64, on the device of the generator."""
    device = None if generator is None else generator.device
    # an image's seeds first, so that they do not depend on the number of images
    return torch.randint(2**_BITS, (images, uses), generator=generator, device=device).t()


def random_numbers(seeds: Tensor, count: int, numbers: Tensor | None = None) -> Tensor:
    """Random numbers (B, count) int64, 0 or more, from seeds (B,) int64.

    splitmix64 with arithmetic shifts, as torch has no unsigned 64-bit integers.

    Args:
        seeds: (B,) int64.
        count: how many of each seed.
        numbers: (count,) int64, which ones of its sequence; by default the first.
    """
    numbers = torch.arange(count, device=seeds.device) if numbers is None else numbers
    state = seeds[:, None] + (numbers + 1) * _INCREMENT
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        state = (state ^ (state >> shift)).mul_(factor)
    return state.bitwise_and_(2**_BITS - 1)


def subsample_labels(
    labels: Tensor,
    count: int,
    positive_fraction: float,
    seeds: Tensor,
    sample_with_replacement: bool = False,
    numbers: Tensor | None = None,
) -> Samples:
    """Sample candidates of each image at random.

    Args:
        labels: (B, N) labels from `assign_labels`.
        count: number of samples of an image, at most.
        positive_fraction: positives are at most this fraction of `count`.
        seeds: (B,) int64, from `image_seeds`.
        sample_with_replacement: return exactly `count`, with repeats if there are too few negatives. If there are no
            negatives, all samples are positives, as in the reference.
        numbers: (N,) int64 that the candidates are known by, from which their random order is made; by default 0 to N.

    Returns:
        The samples; S is `count` with replacement, if there are candidates, and otherwise min(count, N).
    """
    candidates = labels.shape[1]
    size = min(count, candidates) if not sample_with_replacement or candidates == 0 else count
    keys = random_numbers(seeds, candidates, numbers)
    positives, objects = _shuffled(labels == POSITIVE, keys, size)
    negatives, background = _shuffled(labels == NEGATIVE, keys, size)
    slot = torch.arange(size, device=labels.device)
    taken = objects.clamp(max=int(count * positive_fraction))
    if sample_with_replacement:
        taken = taken.masked_fill((background == 0) & (objects > 0), count)
        again = random_numbers(~seeds, size)  # independent of those of the candidates
        first = _repeated(slot.expand(len(labels), -1), objects, taken, again)
        second = _repeated(slot - taken, background, count - taken, again)
    else:
        first, second = slot.expand(len(labels), -1), slot - taken
    positive = slot < taken
    valid = positive | ((second >= 0) & (second < background))
    index = torch.where(positive, _picked(positives, first), _picked(negatives, second))
    return Samples(index, positive, valid)


def _shuffled(wanted: Tensor, keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Wanted candidates in a random order, (B, T), then others as filler; and how many are wanted, (B, 1)."""
    order = keys.masked_fill(~wanted, -1).topk(min(size, keys.shape[1]), dim=1).indices
    return order, wanted.sum(dim=1, keepdim=True)


def _repeated(place: Tensor, there: Tensor, needed: Tensor, again: Tensor) -> Tensor:
    """Places (B, S) in a random order of `there` (B, 1) candidates; random ones, with repeats, if more are needed."""
    return torch.where(there < needed, again % there.clamp(min=1), place)


def _picked(order: Tensor, place: Tensor) -> Tensor:
    """Candidates (B, S) at places (B, S) of an order (B, T); any candidate where the place is out of range."""
    return order.gather(1, place.clamp(0, max(order.shape[1] - 1, 0)))
