"""Where an artifact leaves the reference: op by op, layer by layer."""
