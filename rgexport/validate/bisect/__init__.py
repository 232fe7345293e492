"""Errors of an artifact op by op, and costs layer by layer."""
