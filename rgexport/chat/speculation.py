"""How many drafted tokens a pass takes: as many as pay, by what passes took on this machine."""

from collections.abc import Sequence

from rgexport.chat.jobs import Job
from rgexport.chat.lookup import Draft

_SLOPE = 0.3
"""What each further token adds to a pass, in steps of one token, before anything is known."""
_GAIN = 1.02
"""A pass with drafts must promise so many times the tokens per second of a plain step."""
_OLD = 0.8
"""What a mean keeps of older figures."""
_FRESH = 100
"""Passes after which a figure is no longer trusted: the machine may have other work now."""
_FORGET = 0.99
"""What is left, after a plain step, of how far the slope is from the one before all."""


class Speculation:
    """The drafts of all that write."""

    def __init__(self, most_tokens: int) -> None:
        """Begins; a pass over all rows takes at most so many tokens."""
        self._most = most_tokens
        self._seconds: dict[tuple[int, int], float] = {}
        self._measured: dict[tuple[int, int], int] = {}
        self._passes = 0
        self._slope = _SLOPE
        self._drafts: list[tuple[Job, Draft, int]] = []

    def tokens(self, jobs: Sequence[Job]) -> list[list[int]]:
        """What to feed for each row: its last token, and equally many drafted ones, or none."""
        most = self._most // len(jobs) - 1
        self._drafts = []
        if most > 0:
            for job in jobs:
                left = job.request.max_new_tokens - job.written - 1
                draft = job.lookup.draft(min(most, left))
                self._drafts.append((job, draft, len(job.ids)))
        count = self._length([job.lookup.chances(draft) for job, draft, _ in self._drafts], most)
        if not count:
            return [job.ids[-1:] for job in jobs]
        return [
            # Where a draft is shorter, any token may stand.
            [job.ids[-1], *draft.tokens[:count], *job.ids[-1:] * (count - len(draft.tokens))]
            for job, draft, _ in self._drafts
        ]

    def passed(self, rows: int, tokens: int, seconds: float) -> None:
        """Notes what came, and how long a pass of so many tokens in each row took."""
        for job, draft, before in self._drafts:
            job.lookup.learn(draft, job.ids[before:])
        self._drafts = []
        self._passes += 1
        known = self._seconds.get((rows, tokens))
        first = (rows, tokens) not in self._measured
        self._measured[rows, tokens] = self._passes
        if first:  # it made its arrays, and tells little
            return
        mean = seconds if known is None else _OLD * known + (1 - _OLD) * seconds
        self._seconds[rows, tokens] = mean
        if tokens == 1:
            self._slope = _SLOPE + _FORGET * (self._slope - _SLOPE)
        elif plain := self._known(rows, 1):
            slope = max(0.0, seconds / plain - 1) / (tokens - 1)
            self._slope = _OLD * self._slope + (1 - _OLD) * slope

    def _length(self, chances: Sequence[Sequence[float]], most: int) -> int:
        """How many drafted tokens of each row promise most tokens per second."""
        rows = len(chances)
        step = self._known(rows, 1)
        if not step or not any(chances):
            return 0
        best, length = _GAIN * rows / step, 0
        right, expected = [1.0] * rows, float(rows)
        for count in range(1, most + 1):
            for row, chance in enumerate(chances):
                right[row] *= chance[count - 1] if count <= len(chance) else 0.0
            expected += sum(right)
            rate = expected / self._time(rows, count + 1, step)
            if rate > best:
                best, length = rate, count
        return length

    def _time(self, rows: int, tokens: int, step: float) -> float:
        return self._known(rows, tokens) or step * (1 + self._slope * (tokens - 1))

    def _known(self, rows: int, tokens: int) -> float | None:
        """How long such a pass takes, if that was measured not long ago."""
        fresh = self._passes - self._measured.get((rows, tokens), -_FRESH) < _FRESH
        return self._seconds.get((rows, tokens)) if fresh else None
