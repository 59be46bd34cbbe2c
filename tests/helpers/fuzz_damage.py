"""Random damage to files, with words of their format, for the fuzz tests of checkpoints and recipes."""

import random


def damaged(data: bytes, numbers: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """Apply one to six changes: flip bits, insert words, or repeat, copy, overwrite or remove pieces."""
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
