"""Training: a recipe, an instances file and images make a run directory."""
