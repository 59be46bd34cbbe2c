"""The version of refdet, which the files it writes record."""

__version__ = "0.1.0"
