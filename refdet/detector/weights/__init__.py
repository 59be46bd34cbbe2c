"""Weights of other programs: which network they are, and the same in our names."""
