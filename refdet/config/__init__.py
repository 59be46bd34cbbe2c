"""Recipes: everything that defines a training run, as typed values with bounds."""
