"""The group of all benchmarks whose data is at hand."""
