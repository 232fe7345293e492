"""Compares what identifies a model, apart from its weights, with the original's."""
