"""Damage to files of bytes, for the fuzz tests of checkpoints and recipes, and what may come of it."""

import random
import resource
import time
from collections.abc import Callable, Iterator

from fuzzing import SECONDS

from refdet.errors import RefdetError

MOST_MEMORY = 2**31  # bytes that a case may take beyond what the process had
MOST_SECONDS = 20.0  # of one case
LONGEST_MESSAGE = 1000


def rounds(least: int = 20) -> Iterator[random.Random]:
    """Generators of numbers, each with a seed of its own, for `SECONDS`, and `least` of them in any case."""
    end, seed = time.monotonic() + SECONDS, 0
    while seed < least or time.monotonic() < end:
        yield random.Random(seed)
        seed += 1


def damaged(data: bytes, numbers: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """Bytes with one to six changes: bits, words, pieces that are doubled, moved, cut out or cut short."""
    out = bytearray(data)
    for _ in range(numbers.randint(1, 6)):
        place, length = numbers.randrange(len(out) + 1), numbers.choice((1, 2, 4, 8, 30, 300))
        piece = bytes(out[place : place + length])
        kind = numbers.randrange(8)
        if kind == 0 and piece:
            out[place] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            out[place : place + length] = numbers.randbytes(len(piece))
        elif kind == 2:
            out[place:place] = piece * numbers.choice((1, 2, 50))
        elif kind == 3:
            del out[place : place + length]
        elif kind == 4:
            at = numbers.randrange(len(out) + 1)
            out[at:at] = piece
        elif kind == 5 and numbers.random() < 0.2:
            del out[place:]
        elif kind == 6:
            out[place : place + length] = numbers.choice((b"\0", b"\xff", b"9")) * len(piece)
        elif words:
            out[place : place + numbers.choice((0, len(piece)))] = numbers.choice(words)
    return bytes(out)


def survives(what: str, work: Callable[[], object]) -> bool:
    """Do something with damaged input: it succeeds, or ends in one short line. Returns whether it succeeded."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        work()
        succeeded = True
    except RefdetError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < LONGEST_MESSAGE, f"{what}: {text!r}"
        assert "Error" not in text.partition(" (")[0], f"{what}: {text}"
        succeeded = False
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert taken < MOST_MEMORY, f"{what} took {taken} bytes"
    assert time.monotonic() - started < MOST_SECONDS, f"{what} took {time.monotonic() - started:.0f} s"
    return succeeded
