"""Reads and checks a saved Core ML package; knows nothing of how one is made."""
