"""Export a store to the file formats of existing models. No torch."""
