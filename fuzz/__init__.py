"""Fuzzers: of the native ops and of the readers of files."""
