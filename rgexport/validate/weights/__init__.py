"""Stored weights against those that they were made from."""
