"""Speed and memory of an artifact, beside what the machine can read."""
