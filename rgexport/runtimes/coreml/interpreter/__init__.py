"""Executes MIL programs in numpy; shares no code with the emitter."""
