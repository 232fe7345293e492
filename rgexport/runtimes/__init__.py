"""Engines behind one Session interface, and what is built on it: sampling, chat."""
