"""Export RecurrentGemma (Griffin) checkpoints to files that small devices run."""

__version__ = "0.1.0"
