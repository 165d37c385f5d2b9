"""Comparisons of runs: read lm-eval's output, test, tell from noise, show."""
