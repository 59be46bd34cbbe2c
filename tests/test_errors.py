"""Messages of errors, which processes send each other."""

from __future__ import annotations

import copy
import pickle

import pytest

from refdet.errors import ArgumentError, Interrupted, RefdetError, RuntimeFailure, UnusableImageError


@pytest.mark.parametrize(
    ("error", "message", "text"),
    [
        (RuntimeFailure("a.h5: disk full"), "a.h5: disk full", "a.h5: disk full"),
        (
            RuntimeFailure("a.h5: disk full", fix="free some space"),
            "a.h5: disk full",
            "a.h5: disk full; free some space",
        ),
        (ArgumentError("workers", "is 0"), "workers: is 0", "workers: is 0"),
        (UnusableImageError("1.jpg: damaged"), "1.jpg: damaged", "`strict`: 1.jpg: damaged"),
        (UnusableImageError("1.jpg: damaged", fix="mend it"), "1.jpg: damaged", "`strict`: 1.jpg: damaged; mend it"),
        (Interrupted(), "", ""),
    ],
)
def test_the_fix_ends_the_text_of_an_error(error: RefdetError, message: str, text: str) -> None:
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(same) is type(error) and (same.message, str(same)) == (message, text)
