"""The model: configuration, checkpoints, op set, step model, state contract."""
