"""Errors of an artifact op by op."""
