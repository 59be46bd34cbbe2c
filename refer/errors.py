"""What can be wrong with REFER data. Every message is one line that names the file or id."""


class ReferError(Exception):
    """Base of all errors of this package."""


class ReferDataError(ReferError, ValueError):
    """A file of REFER data, or an id asked for, is wrong."""


class ReferNotFoundError(ReferError, FileNotFoundError):
    """A dataset, split or file is not there; the message lists what is."""
