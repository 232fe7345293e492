"""Engines behind one Session interface."""
