"""The commands of the command line: thin ones, no logic."""
