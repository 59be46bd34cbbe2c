"""Files and what goes with them: atomic writes, locks, kinds, safe texts, progress."""
