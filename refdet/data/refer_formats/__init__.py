"""The formats in which REFER is distributed besides its own, and their conversion to its own layout."""
