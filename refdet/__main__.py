"""``python -m refdet``: the same as ``refdet``."""

from refdet.cli.main import main

main(prog_name="refdet")
