"""The built-in text: prose, programs, tables and many languages in a few thousand tokens."""

from pathlib import Path

BUILT_IN = Path(__file__).with_name("text.txt")
"""A text of many kinds, because sampled text has little of what the model rarely writes."""
