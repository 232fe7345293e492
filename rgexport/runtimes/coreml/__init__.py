"""Core ML on macOS, and an interpreter of the same programs elsewhere."""
