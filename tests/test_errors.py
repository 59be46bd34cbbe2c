"""Texts of errors, also after copying and pickling: worker processes send them to the main process."""

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
        (
            UnusableImageError("1.jpg: damaged", fix="replace it"),
            "1.jpg: damaged",
            "`strict`: 1.jpg: damaged; replace it",
        ),
        (Interrupted(), "", ""),
    ],
)
def test_an_error_keeps_its_type_and_text_when_copied_or_pickled(error: RefdetError, message: str, text: str) -> None:
    for equal in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(equal) is type(error) and (equal.message, str(equal)) == (message, text)
