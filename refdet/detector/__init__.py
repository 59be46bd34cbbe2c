"""The detector: the network, its checkpoints, and what it makes of images."""
