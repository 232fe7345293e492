"""Lowers a step program to Core ML's MIL, and writes the package."""
