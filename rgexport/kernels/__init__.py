"""Native code: the model inside of other people's engines."""
