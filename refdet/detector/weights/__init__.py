"""Import weights of other programs, and export weights to them."""
