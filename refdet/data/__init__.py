"""Data: instances files, images and their decoding, transforms, training batches. It knows no network."""
