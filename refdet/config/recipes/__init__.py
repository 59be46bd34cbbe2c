"""The recipes shipped with refdet."""
