"""File helpers: atomic writes, locks, file kinds, safe text and progress bars."""
