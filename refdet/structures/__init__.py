"""The values that all parts share: boxes, regions, ground truth, provenance, ids. They know no files and no network."""
