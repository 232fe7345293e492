"""The tasks of lm_eval, and the answers of a model to what they ask."""
