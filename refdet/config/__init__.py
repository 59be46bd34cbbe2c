"""Recipes: typed, range-checked configuration of a training run."""
