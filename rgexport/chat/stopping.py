"""Ending a text where a stop string begins, also one that lies across the borders of tokens."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through but for its end, as long as a stop string may begin there."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Takes the stop strings; empty ones are left out."""
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def add(self, piece: str) -> str:
        """The text that can no longer be part of a stop string; after one, nothing."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = ((text.index(stop), -len(stop), stop) for stop in self._stops if stop in text)
        if first := min(ends, default=None):
            self.found, self._held = first[2], ""
            return text[: first[0]]
        sure = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[sure:]
        return text[:sure]

    def finish(self) -> str:
        """What was held back, since no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
