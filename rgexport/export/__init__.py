"""Exports a checkpoint to an artifact: traces the model, and writes one folder or file."""
