"""Random damage to files, with words of their format, for the fuzz tests of checkpoints and recipes."""

import random


def damage(data: bytes, rng: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """Apply one to six changes: flip bits, insert words, or repeat, copy, overwrite or remove pieces."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        start, length = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 8, 30, 300))
        piece = bytes(out[start : start + length])
        kind = rng.randrange(8)
        if kind == 0 and piece:
            out[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[start : start + length] = rng.randbytes(len(piece))
        elif kind == 2:
            out[start:start] = piece * rng.choice((1, 2, 50))
        elif kind == 3:
            del out[start : start + length]
        elif kind == 4:
            target = rng.randrange(len(out) + 1)
            out[target:target] = piece
        elif kind == 5 and rng.random() < 0.2:
            del out[start:]
        elif kind == 6:
            out[start : start + length] = rng.choice((b"\0", b"\xff", b"9")) * len(piece)
        elif words:
            out[start : start + rng.choice((0, len(piece)))] = rng.choice(words)
    return bytes(out)
