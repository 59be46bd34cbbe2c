"""The command line: one command a module, found by its name."""
