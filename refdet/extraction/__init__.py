"""Extraction: the regions and features of a list of images, by a trained detector, into a store; resumable."""
