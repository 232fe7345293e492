"""What the model is: configuration, checkpoints, op set, step model, state contract."""
