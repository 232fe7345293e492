"""The end of a streamed text at a stop string."""

from collections.abc import Sequence


class StopStrings:
    """Ends a text at a stop string (`match`); holds back its end while one may begin there."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.match: str | None = None

    def add(self, piece: str) -> str:
        """Takes the next piece of the text; returns what can be shown, "" after a match."""
        if self.match is not None:
            return ""
        text = self._held + piece
        stop = self._first_stop(text)
        if stop is not None:
            self.match = stop
            self._held = ""
            return text[: text.index(stop)]

        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        sure = len(text) - held
        self._held = text[sure:]
        return text[:sure]

    def finish(self) -> str:
        """Returns the text that was held back: no stop string follows."""
        held = self._held
        self._held = ""
        return held

    def _first_stop(self, text: str) -> str | None:
        """Returns the stop string that begins first in a text, the longest of several there."""
        stops = [stop for stop in self._stops if stop in text]
        return min(stops, key=lambda stop: (text.index(stop), -len(stop)), default=None)


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest beginning of `stop` that ends `text`."""
    longest = min(len(text), len(stop) - 1)
    for length in range(longest, 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
