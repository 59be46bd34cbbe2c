"""Errors of REFER data, with one-line messages that have the file or id."""


class ReferError(Exception):
    """Base class of all errors of this package."""


class ReferDataError(ReferError, ValueError):
    """Invalid REFER data, or an invalid request."""


class ReferIdError(ReferDataError, KeyError):
    """Unknown ref, annotation, image or category; also a KeyError, as in the original."""

    def __str__(self) -> str:
        return ReferError.__str__(self)  # KeyError would quote the message


class ReferNotFoundError(ReferError, FileNotFoundError):
    """Missing dataset, split or file; the message lists the existing ones."""
