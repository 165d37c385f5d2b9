"""What the evaluation uses: the records, where they come from, and the wall that keeps training from them."""
