"""Measures the abilities of models: suites of texts and tasks for artifacts of any format."""
