"""Sample anchors and RoIs for the losses, for a whole batch at once and without synchronizing with a GPU.

Shape shorthand in this module:

    B: images in the batch
    N: candidates of an image, anchors or RoIs
    S: samples of an image
    T: candidates in a random order, at most min(S, N)

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
_BITS = 62  # of a random number, so that as int64 it is never negative


@dataclass(frozen=True)
class Samples:
    """Sampled candidates of each image, positives first.

    Attributes:
        index: (B, S) int64 indices of the candidates.
        positive: (B, S) bool, whether the candidate is positive.
        valid: (B, S) bool, False for padding where an image has fewer than S samples.
    """

    index: Tensor
    positive: Tensor
    valid: Tensor


def image_seeds(images: int, uses: int, generator: torch.Generator | None) -> Tensor:
    """Random seeds (uses, images) int64, on the device of the generator.

    Args:
        images: number of images.
        uses: number of seeds per image, one for each call of `subsample_labels`.
        generator: source of the seeds; PyTorch's global generator if None.
    """
    device = None if generator is None else generator.device
    # drawn image after image, so that those of the first images do not depend on the number of images
    return torch.randint(2**_BITS, (images, uses), generator=generator, device=device).t()


def random_numbers(seeds: Tensor, count: int, positions: Tensor | None = None) -> Tensor:
    """Random numbers (B, count) int64, 0 or more, from seeds (B,) int64.

    The generator is splitmix64 with arithmetic shifts, as torch has no logical shift of 64-bit integers.

    Args:
        seeds: (B,) int64.
        count: numbers per seed.
        positions: (count,) int64 positions in the sequence of each seed; 0 to count - 1 by default.
    """
    positions = torch.arange(count, device=seeds.device) if positions is None else positions
    state = seeds[:, None] + (positions + 1) * _INCREMENT
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        state = (state ^ (state >> shift)).mul_(factor)
    return state.bitwise_and_(2**_BITS - 1)


def subsample_labels(
    labels: Tensor,
    count: int,
    positive_fraction: float,
    seeds: Tensor,
    sample_with_replacement: bool = False,
    candidate_ids: Tensor | None = None,
) -> Samples:
    """Sample candidates of each image at random.

    Args:
        labels: (B, N) labels from `assign_labels`.
        count: number of samples of an image, at most.
        positive_fraction: positives are at most this fraction of `count`.
        seeds: (B,) int64, from `image_seeds`.
        sample_with_replacement: return exactly `count`, with repeats if there are too few negatives. If there are no
            negatives but positives, all samples are positives, as in the reference.
        candidate_ids: (N,) int64 ids of the candidates, which determine their random order; by default 0 to N - 1.

    Returns:
        The samples. S is min(count, N), or `count` with replacement unless there are no candidates.
    """
    candidates = labels.shape[1]
    size = min(count, candidates) if not sample_with_replacement or candidates == 0 else count
    keys = random_numbers(seeds, candidates, candidate_ids)
    positives, available_positives = _random_order(labels == POSITIVE, keys, size)
    negatives, available_negatives = _random_order(labels == NEGATIVE, keys, size)
    slot = torch.arange(size, device=labels.device)  # of the samples: positives fill the first ones, negatives the rest
    num_positives = available_positives.clamp(max=int(count * positive_fraction))
    if sample_with_replacement:
        num_positives = num_positives.masked_fill((available_negatives == 0) & (available_positives > 0), count)
        repeats = random_numbers(~seeds, size)  # independent of the random order of the candidates
        from_positives = _repeat_if_short(slot.expand(len(labels), -1), available_positives, num_positives, repeats)
        from_negatives = _repeat_if_short(slot - num_positives, available_negatives, count - num_positives, repeats)
    else:
        from_positives, from_negatives = slot.expand(len(labels), -1), slot - num_positives
    positive = slot < num_positives
    valid = positive | ((from_negatives >= 0) & (from_negatives < available_negatives))
    index = torch.where(positive, _select(positives, from_positives), _select(negatives, from_negatives))
    return Samples(index, positive, valid)


def _random_order(mask: Tensor, keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Order the candidates in a mask at random.

    Args:
        mask: (B, N) bool.
        keys: (B, N) int64 random numbers, 0 or more; the candidate with the highest comes first.
        size: largest number of candidates to return per image.

    Returns:
        Candidates (B, T), those outside the mask last, and the number of candidates in the mask (B, 1).
    """
    order = keys.masked_fill(~mask, -1).topk(min(size, keys.shape[1]), dim=1).indices
    return order, mask.sum(dim=1, keepdim=True)


def _repeat_if_short(index: Tensor, available: Tensor, needed: Tensor, repeats: Tensor) -> Tensor:
    """Replace indices by random ones, with repeats, in images that have fewer candidates than needed.

    Args:
        index: (B, S) indices into a random order of candidates.
        available: (B, 1) number of candidates in the order.
        needed: (B, 1) number of samples needed.
        repeats: (B, S) random numbers.
    """
    return torch.where(available < needed, repeats % available.clamp(min=1), index)


def _select(order: Tensor, index: Tensor) -> Tensor:
    """Candidates (B, S) at indices (B, S) of an order (B, T); any candidate where the index is out of range."""
    return order.gather(1, index.clamp(0, max(order.shape[1] - 1, 0)))
