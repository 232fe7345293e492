"""GGUF: one file for llama.cpp, written in one pass and read back."""
