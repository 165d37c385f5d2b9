"""Reads a checkpoint without loading a model: its files, one matrix, its vocabulary, and the state it is in."""
