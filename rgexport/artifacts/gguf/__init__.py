"""GGUF files: tensor names, the header that rgexport checks, and the vocabulary."""
