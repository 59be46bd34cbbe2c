"""Exports: a store of regions in the forms that models people already have load as they are. No torch."""
