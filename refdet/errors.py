"""The two ways a command can fail; the command line turns each into one line and an exit code."""


class RefdetError(Exception):
    """An error whose message is written for the user: it names the culprit and the mend."""

    exit_code = 1


class InputError(RefdetError):
    """Something the user gave is wrong: a file, an option, a recipe key. Exit code 2."""

    exit_code = 2


class WorkError(RefdetError):
    """The work itself failed: a non-finite loss, a full disk, a leak found. Exit code 1."""

    exit_code = 1
