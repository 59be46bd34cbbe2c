"""What can be wrong with REFER data. Every message is one line that names the file or id."""


class ReferError(Exception):
    """Base of all errors of this package."""


class ReferDataError(ReferError, ValueError):
    """A file of REFER data, or what was asked of it, is wrong."""


class ReferIdError(ReferDataError, KeyError):
    """There is no such ref, annotation, image or category. Also a KeyError, which the original raises."""

    def __str__(self) -> str:
        return ReferError.__str__(self)  # KeyError's own puts quotes around the message


class ReferNotFoundError(ReferError, FileNotFoundError):
    """A dataset, split or file is not there; the message lists what is."""
