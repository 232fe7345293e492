"""The text that comes with rgexport, to try tokenizers and models on."""

from importlib.resources import files


def built_in_text() -> str:
    """Returns prose, code, tables, numbers, other languages, emoji and a conversation; 5.9 kB."""
    return (files("rgexport.chat") / "sample.txt").read_text("utf-8")
