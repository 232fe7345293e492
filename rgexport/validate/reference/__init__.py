"""Reference files: what the full model computes, captured, and artifacts compared with it."""
