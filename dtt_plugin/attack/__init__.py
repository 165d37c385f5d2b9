"""Adaptive attacks: suffixes, or vectors, optimised white-box against one arm, exactly as it is evaluated."""
