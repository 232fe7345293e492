"""Exports a checkpoint to an artifact: the trace, one folder per format, the manifest."""
