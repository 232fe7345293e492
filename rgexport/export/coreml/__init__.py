"""Exports to Core ML: lowers the step program to MIL, and writes packages."""
