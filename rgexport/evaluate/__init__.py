"""What a model can do: suites of tasks and texts for artifacts of any format, side by side."""
