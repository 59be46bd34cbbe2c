"""Training: from a recipe, an instances file and images to a run directory."""
