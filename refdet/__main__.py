"""``python -m refdet``: the same as ``refdet``."""

import os
import sys

import refdet


def _remove_current_folder() -> None:
    """Remove the current folder, which Python puts first, from sys.path, unless refdet itself is in it.

    A folder of downloaded data may contain a numpy.py that must not be run.
    """
    folder = sys.path[0] if sys.path else None
    if folder in ("", os.getcwd()) and not os.path.samefile(folder or ".", os.path.join(refdet.__path__[0], "..")):
        del sys.path[0]


_remove_current_folder()

from refdet.cli.main import main  # noqa: E402

main(prog_name="refdet")
