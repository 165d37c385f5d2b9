"""Tasks for what a defense costs in use: lm-eval's own, on files that are at hand."""
