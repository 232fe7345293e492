"""What the full-precision model says, captured into a file, and artifacts against it."""
