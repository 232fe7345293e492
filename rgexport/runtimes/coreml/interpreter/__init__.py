"""Executes MIL programs on any machine, in numpy; shares no code with what emits them."""
