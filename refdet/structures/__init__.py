"""Data structures shared by all packages: boxes, regions, ground truth, provenance, ids. No file or network code."""
