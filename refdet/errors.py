"""How a command can fail; the command line turns each into one line and an exit code."""

import errno
import os


class RefdetError(Exception):
    """An error whose message is written for the user: it names the culprit and the mend."""

    exit_code = 1


class InputError(RefdetError):
    """Something the user gave is wrong: a file, an option, a recipe key. Exit code 2."""

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

    def __str__(self) -> str:
        return f"{self.argument}: {self.problem}"


class RuntimeFailure(RefdetError):
    """The work itself failed: a non-finite loss, a full disk, a leak found. Exit code 1."""

    exit_code = 1


class Interrupted(RefdetError):
    """The work was stopped by Ctrl-C or a signal; what was finished is kept. Exit code 130, whatever the signal."""

    exit_code = 130


# What the system says of one file, which another one beside it need not share.
_OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
              errno.EINVAL}  # fmt: skip


def is_of_the_machine(error: BaseException) -> bool:
    """Whether what failed to be read may be sound: the disk, the network, memory or the process's limits failed.

    A decoder's OSError for a damaged file has no number.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _OF_A_FILE
    return isinstance(error, MemoryError)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error comes of a full disk or quota; HDF5 and safetensors say so in their text alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    return any(f"errno = {number}," in str(error) or os.strerror(number) in str(error) for number in full)
