"""The tasks of lm_eval, and a model's answers to their requests."""
