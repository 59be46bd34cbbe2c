"""Exceptions that the command line reports as one line and an exit code.

Messages put arguments of the Python API in backquotes: `images`, `resume=True`; likewise recipe keys with the value to
set, `train.workers=0`. The command line shows its own options instead.
"""

import errno
import os


class RefdetError(Exception):
    """Base class of errors with a message for the user, "name: problem; fix".

    Attributes:
        fix: the fix, where a caller may replace it by a better one; else "", and the fix is part of ``message``.
    """

    exit_code = 1

    def __init__(self, *args: object, fix: str = "") -> None:
        super().__init__(*args)
        self.fix = fix

    @property
    def message(self) -> str:
        """The message without ``fix``."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}" if self.fix else self.message


class InputError(RefdetError):
    """Invalid input: a file, an option or a recipe key. Exit code 2."""

    exit_code = 2


class ArgumentError(InputError, ValueError):
    """An argument of a function has a value that it cannot have.

    Attributes:
        argument: name of the argument.
        problem: what is wrong with its value.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument, self.problem = argument, problem

    @property
    def message(self) -> str:
        """The name of the argument and the problem."""
        return f"{self.argument}: {self.problem}"


class RuntimeFailure(RefdetError):
    """A failure at run time: a non-finite loss, a full disk or a detected leak. Exit code 1."""

    exit_code = 1


class UnusableImageError(RuntimeFailure):
    """An image cannot be used and ``strict`` is True; ``message`` is the reason. Exit code 1."""

    def __str__(self) -> str:
        return f"`strict`: {super().__str__()}"


class Interrupted(RefdetError):
    """Stopped by Ctrl-C or another signal; finished work is kept. Exit code 130 for every signal."""

    exit_code = 130


# Errors specific to a single file, which need not affect other files on the same disk.
_FILE_ERRNOS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
}


def is_system_error(error: BaseException) -> bool:
    """Whether a read failed because of the machine (disk, network, memory, process limits), not because of the file.

    The errno decides; an OSError that a decoder raises for a damaged file has none.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _FILE_ERRNOS
    return isinstance(error, MemoryError)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is caused by a full disk or quota; HDF5 and safetensors report it only in their message."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    # HDF5 writes "errno = 28,", safetensors the message of the operating system
    return any(f"errno = {number}," in str(error) or os.strerror(number) in str(error) for number in full)
