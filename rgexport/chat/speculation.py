"""Sizes of passes, chosen by the times of earlier passes: prefill chunks, and drafts to check."""

from collections.abc import Sequence

from rgexport.chat.jobs import GenerationJob
from rgexport.chat.prompt_lookup import Draft
from rgexport.runtimes.session import Session

_PRIOR_SLOPE = 0.3
"""Time that each further token adds to a pass, in steps of one token, before it is measured."""

_LEAST_GAIN = 1.02
"""A pass with drafts must promise so many times the tokens per second of a plain step."""

_DECAY = 0.8
"""Weight of the earlier mean of a time, beside the latest measurement."""

_FRESH_PASSES = 100
"""Passes after which a time is outdated: the machine's load may have changed."""

_SLOPE_DECAY = 0.99
"""Factor by which the slope approaches `_PRIOR_SLOPE` at each plain step, so that drafts are tried
again after a slow pass."""

_MIN_CHUNK = 16
"""Tokens of the smallest chunk, unless the engine has chunks of a fixed length."""

_MAX_CHUNK = 512

_FIRST_CHUNK_UNITS = 4
"""Length of a chunk before any was measured, in smallest chunks."""

_TILE = 64
"""Chunks are multiples of this if possible: engines are slower at fewer tokens."""

_CHUNK_SECONDS = 2.5
"""Longest time of a chunk while no conversation decodes."""

_CHUNK_STEPS = 1.5
"""Longest time of a chunk, in decode steps, while other conversations decode."""


class ChunkSize:
    """The number of tokens of a prefill chunk, so that no conversation that decodes waits long.

    It is not thread-safe: only the scheduler's thread uses it.
    """

    def __init__(self, session: Session) -> None:
        info = session.info
        self._unit = info.prefill_chunk if info.whole_chunks else _MIN_CHUNK
        self._token_seconds = 0.0
        self._step_seconds = 0.0

    def record_chunk(self, tokens: int, seconds: float) -> None:
        """Takes the time of a chunk; shorter ones than `_MIN_CHUNK` are not typical."""
        if tokens >= _MIN_CHUNK:
            self._token_seconds = _mean(self._token_seconds, seconds / tokens)

    def record_step(self, seconds: float) -> None:
        """Takes the time of a decode step."""
        self._step_seconds = _mean(self._step_seconds, seconds)

    def tokens(self, *, alone: bool) -> int:
        """Returns the length of the next chunk; `alone` if no conversation decodes."""
        if not self._token_seconds:
            return self._unit * _FIRST_CHUNK_UNITS

        seconds = _CHUNK_SECONDS
        if not alone:
            seconds = _CHUNK_STEPS * self._step_seconds
        fitting = int(seconds / self._token_seconds)

        unit = self._unit
        if fitting >= _TILE:
            unit *= max(1, _TILE // self._unit)
        whole_units = fitting // unit * unit
        return max(self._unit, min(whole_units, _MAX_CHUNK))


class Speculation:
    """The drafts of all conversations that decode.

    It is not thread-safe: only the scheduler's thread uses it.
    """

    def __init__(self, max_tokens: int) -> None:
        """Takes the largest number of tokens of a pass, of all rows together."""
        self._max_tokens = max_tokens
        self._measured: dict[tuple[int, int], tuple[float, int]] = {}
        """(rows, tokens of each row) → mean time of such a pass, and the number of the last one."""
        self._passes = 0
        self._slope = _PRIOR_SLOPE
        self._drafts: list[tuple[GenerationJob, Draft, int]] = []
        """Each job, its draft, and the length of its text before the pass."""

    def tokens(self, jobs: Sequence[GenerationJob]) -> list[list[int]]:
        """Returns the input of each row: its last token, and equally many drafted ones, or none."""
        max_drafted = self._max_tokens // len(jobs) - 1
        self._drafts = []
        if max_drafted > 0:
            for job in jobs:
                remaining = job.request.max_new_tokens - job.written - 1
                draft = job.lookup.draft(min(max_drafted, remaining))
                self._drafts.append((job, draft, len(job.ids)))

        chances = [job.lookup.chances(draft) for job, draft, _ in self._drafts]
        count = self._draft_length(chances, max_drafted)
        if not count:
            return [job.ids[-1:] for job in jobs]
        return [_draft_input(job, draft, count) for job, draft, _ in self._drafts]

    def record_pass(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes the time of a pass of `tokens` in each row, and compares drafts with the texts."""
        for job, draft, length_before in self._drafts:
            job.lookup.learn(draft, job.ids[length_before:])
        self._drafts = []

        self._passes += 1
        if (rows, tokens) not in self._measured:
            # The first such pass allocated its arrays, so its time is not typical.
            self._measured[rows, tokens] = (0.0, self._passes)
            return
        earlier_mean, _ = self._measured[rows, tokens]
        self._measured[rows, tokens] = (_mean(earlier_mean, seconds), self._passes)
        self._update_slope(rows, tokens, seconds)

    def _update_slope(self, rows: int, tokens: int, seconds: float) -> None:
        if tokens == 1:
            self._slope = _PRIOR_SLOPE + _SLOPE_DECAY * (self._slope - _PRIOR_SLOPE)
            return
        step_seconds = self._fresh_seconds(rows, 1)
        if step_seconds:
            slope = max(0.0, seconds / step_seconds - 1) / (tokens - 1)
            self._slope = _DECAY * self._slope + (1 - _DECAY) * slope

    def _draft_length(self, chances: Sequence[Sequence[float]], max_drafted: int) -> int:
        """Returns the number of drafted tokens that promises the most tokens per second.

        `chances` has for each row the probabilities of its drafted tokens.
        """
        rows = len(chances)
        step_seconds = self._fresh_seconds(rows, 1)
        if not step_seconds or not any(chances):
            return 0

        best_length = 0
        best_rate = _LEAST_GAIN * rows / step_seconds
        accepted = [1.0] * rows
        expected_tokens = float(rows)
        for length in range(1, max_drafted + 1):
            for row, chance in enumerate(chances):
                accepted[row] *= chance[length - 1] if length <= len(chance) else 0.0
            expected_tokens += sum(accepted)
            rate = expected_tokens / self._pass_seconds(rows, length + 1, step_seconds)
            if rate > best_rate:
                best_length = length
                best_rate = rate
        return best_length

    def _pass_seconds(self, rows: int, tokens: int, step_seconds: float) -> float:
        """Returns the measured time of a pass, or an estimate from the time of a plain step."""
        measured = self._fresh_seconds(rows, tokens)
        return measured or step_seconds * (1 + self._slope * (tokens - 1))

    def _fresh_seconds(self, rows: int, tokens: int) -> float:
        """Returns the time of such a pass, or 0 if it was not measured recently."""
        seconds, last_pass = self._measured.get((rows, tokens), (0.0, 0))
        if self._passes - last_pass < _FRESH_PASSES:
            return seconds
        return 0.0


def _draft_input(job: GenerationJob, draft: Draft, count: int) -> list[int]:
    """Returns the last token and `count` drafted ones; any token pads a shorter draft."""
    last = job.ids[-1:]
    padding = last * (count - len(draft.tokens))
    return [*last, *draft.tokens[:count], *padding]


def _mean(earlier: float, latest: float) -> float:
    """Returns the moving average; `earlier` is 0 before the first measurement."""
    if not earlier:
        return latest
    return _DECAY * earlier + (1 - _DECAY) * latest
