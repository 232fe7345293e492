"""Reads artifacts: opens, describes, checks and downloads them, and returns their weights."""
