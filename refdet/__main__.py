"""``python -m refdet``: the same as ``refdet``."""

import os
import sys

import refdet

# Python puts the current folder first, where a stranger's numpy.py may lie beside the stranger's data.
if (
    sys.path
    and sys.path[0] in ("", os.getcwd())
    and not os.path.samefile(sys.path[0] or ".", refdet.__path__[0] + "/..")
):
    del sys.path[0]

from refdet.cli.main import main  # noqa: E402

main(prog_name="refdet")
