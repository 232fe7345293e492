"""Calibrates models, and finds storage plans for a quality or a size."""
