"""Exports to GGUF: one file for llama.cpp, written in one pass."""
