"""Proof that an artifact computes what the reference computes, and what it cost."""
