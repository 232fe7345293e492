"""Core ML artifacts: packages, their interface, and the weights in their blob files."""
