"""RecurrentGemma in llama.cpp: a model file, its registration, and what builds them."""
