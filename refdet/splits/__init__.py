"""Leak-free splits: find the images that REFER holds out, build splits without them and audit existing ones."""
