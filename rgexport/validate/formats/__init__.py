"""Each format's tolerances, structure and metadata."""
