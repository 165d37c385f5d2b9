"""The measurements behind docs/results.md; `make results` runs them."""
