"""A grid of evaluations from one file."""
