"""Leak-free splits: which images REFER holds out, building a split without them, and proving that it has none."""
