"""The suites, each in a module of its own; `run.SUITES` lists them."""
