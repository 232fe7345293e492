"""The llama.cpp that `rgexport llama-cpp build` makes."""
