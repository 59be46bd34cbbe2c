"""Data: instances files, image decoding, transforms and training batches, independent of the network."""
