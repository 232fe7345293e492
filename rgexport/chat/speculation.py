"""Drafts of the next tokens, by prompt lookup, and the sizes of passes, by their earlier times.

Edits of a text, and answers about a text, repeat much of it: a draft follows an earlier occurrence
of the last tokens, and the model checks it in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rgexport.runtimes.session import Session

if TYPE_CHECKING:
    from rgexport.chat.jobs import GenerationJob

_GRAM = 2  # number of tokens that must match, at least; they are the key of the index
_MOST_POSITIONS = 8
_MOST_INDEXED = 1 << 16  # last tokens of a longer text that are indexed
_INDEXED_AT_ONCE = 512
"""Tokens that one step indexes: indexing must not delay the first token of a reply."""
_PRIOR = {2: 0.15, 3: 0.3, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.75, 8: 0.8}
"""Length of the match → prior probability that the next token matches, too."""
_LONGEST = max(_PRIOR)  # longer matches are not more reliable
_PRIOR_WEIGHT, _RATE_DECAY = 2.0, 0.95
"""Observations that the prior counts for; weight of an observation relative to the next one."""
_PRIOR_SLOPE = 0.3
"""Time that each further token adds to a pass, in steps of one token, before it is measured."""
_LEAST_GAIN = 1.02
"""A pass with drafts must promise so many times the tokens per second of a plain step."""
_DECAY = 0.8
_FRESH_PASSES = 100  # passes after which a time is outdated: the machine's load may have changed
_SLOPE_DECAY = 0.99
"""Factor by which the slope approaches `_PRIOR_SLOPE` at each plain step, so that drafts are tried
again after a slow pass."""
_LEAST_CHUNK, _MOST_CHUNK = 16, 512
_TILE = 64  # chunks are multiples of this if possible: engines are slower at fewer tokens
_CHUNK_SECONDS, _CHUNK_STEPS = 2.5, 1.5
"""Longest time of a chunk: alone, and in decode steps if other conversations decode."""


@dataclass(frozen=True)
class Draft:
    tokens: Sequence[int] = ()
    match: int = 0


class PromptLookup:
    def __init__(self, ids: Sequence[int], source: Sequence[int] = ()) -> None:
        self._ids, self._texts = ids, (source, ids)
        self._indexed = [max(_GRAM, len(text) - _MOST_INDEXED) for text in self._texts]
        self._positions: dict[int, list[int]] = {}
        """Key → its last occurrences, as 2 × end + text: numbers take less memory than pairs."""
        self._accepted = {match: _PRIOR_WEIGHT * chance for match, chance in _PRIOR.items()}
        self._tried = dict.fromkeys(_PRIOR, _PRIOR_WEIGHT)

    def draft(self, most: int) -> Draft:
        """Returns at most `most` tokens, from the last occurrence with the longest match."""
        self._index()
        if len(self._ids) < _GRAM:
            return Draft()
        text, end, match = 0, 0, 0
        for position in reversed(self._positions.get(_key(self._ids, len(self._ids)), [])):
            length = self._match(position % 2, position // 2)
            if length > match:
                text, end, match = position % 2, position // 2, length
        if not match:
            return Draft()
        ids = self._texts[text]
        if ids is not self._ids:
            return Draft(ids[end : end + most], match)
        # A text that repeats itself is expected to go on repeating: the draft wraps around.
        period = len(ids) - end
        return Draft([ids[end + i % period] for i in range(most)], match)

    def chances(self, draft: Draft) -> list[float]:
        """Returns for each token its probability to be accepted if those before it are."""
        matches = (min(draft.match + i, _LONGEST) for i in range(len(draft.tokens)))
        return [self._accepted[match] / self._tried[match] for match in matches]

    def learn(self, draft: Draft, tokens: Sequence[int]) -> None:
        """Updates the rates with the tokens that followed, whether the draft was tried or not."""
        for i, (drafted, token) in enumerate(zip(draft.tokens, tokens, strict=False)):
            match = min(draft.match + i, _LONGEST)
            self._accepted[match] = _RATE_DECAY * self._accepted[match] + (drafted == token)
            self._tried[match] = _RATE_DECAY * self._tried[match] + 1
            if drafted != token:
                return

    def _index(self) -> None:
        for text, ids in enumerate(self._texts):
            stop = min(len(ids), self._indexed[text] + _INDEXED_AT_ONCE)
            for end in range(self._indexed[text], stop):
                positions = self._positions.setdefault(_key(ids, end), [])
                positions.append(2 * end + text)
                if len(positions) > _MOST_POSITIONS:
                    del positions[0]
            self._indexed[text] = max(self._indexed[text], stop)

    def _match(self, text: int, end: int) -> int:
        ids, most = self._texts[text], min(_LONGEST, end, len(self._ids))
        equal = (ids[end - 1 - i] == self._ids[-1 - i] for i in range(most))
        return next((i for i, is_equal in enumerate(equal) if not is_equal), most)


def _key(ids: Sequence[int], end: int) -> int:
    """Returns the last `_GRAM` tokens before `end` as one number: quick, and small in memory."""
    return ids[end - 2] << 32 | ids[end - 1]


class ChunkSize:
    """The number of tokens of a prefill chunk, so that no conversation that decodes waits long."""

    def __init__(self, session: Session) -> None:
        info = session.info
        self._unit = info.prefill_chunk if info.whole_chunks else _LEAST_CHUNK
        self._token_seconds = self._step_seconds = 0.0

    def record_chunk(self, tokens: int, seconds: float) -> None:
        if tokens >= _LEAST_CHUNK:
            self._token_seconds = _mean(self._token_seconds, seconds / tokens)

    def record_step(self, seconds: float) -> None:
        self._step_seconds = _mean(self._step_seconds, seconds)

    def tokens(self, *, alone: bool) -> int:
        seconds = _CHUNK_SECONDS if alone else _CHUNK_STEPS * self._step_seconds
        if not self._token_seconds:
            return self._unit * 4
        fitting = int(seconds / self._token_seconds)
        unit = self._unit * max(1, _TILE // self._unit) if fitting >= _TILE else self._unit
        return max(self._unit, min(fitting // unit * unit, _MOST_CHUNK))


class Speculation:
    """The drafts of all conversations that decode; `most_tokens` limits a pass over all rows."""

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._measured: dict[tuple[int, int], tuple[float, int]] = {}
        """(rows, tokens of each row) → mean time of such a pass, and the number of the last one."""
        self._passes = 0
        self._slope = _PRIOR_SLOPE
        self._drafts: list[tuple[GenerationJob, Draft, int]] = []
        """Each job, its draft, and the length of its text before the pass."""

    def tokens(self, jobs: Sequence["GenerationJob"]) -> list[list[int]]:
        """Returns the input of each row: its last token, and equally many drafted ones, or none."""
        most = self._most // len(jobs) - 1
        self._drafts = []
        if most > 0:
            for job in jobs:
                remaining = job.request.max_new_tokens - job.written - 1
                draft = job.lookup.draft(min(most, remaining))
                self._drafts.append((job, draft, len(job.ids)))
        count = self._length([job.lookup.chances(draft) for job, draft, _ in self._drafts], most)
        if not count:
            return [job.ids[-1:] for job in jobs]
        return [
            # A shorter draft is padded with any token.
            [job.ids[-1], *draft.tokens[:count], *job.ids[-1:] * (count - len(draft.tokens))]
            for job, draft, _ in self._drafts
        ]

    def record_pass(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes the time of a pass of `tokens` in each row, and compares drafts with the texts."""
        for job, draft, before in self._drafts:
            job.lookup.learn(draft, job.ids[before:])
        self._drafts = []
        self._passes += 1
        if (rows, tokens) not in self._measured:  # it allocated its arrays: its time is not typical
            self._measured[rows, tokens] = 0.0, self._passes
            return
        mean = _mean(self._measured[rows, tokens][0], seconds)
        self._measured[rows, tokens] = mean, self._passes
        if tokens == 1:
            self._slope = _PRIOR_SLOPE + _SLOPE_DECAY * (self._slope - _PRIOR_SLOPE)
        elif plain := self._fresh_seconds(rows, 1):
            slope = max(0.0, seconds / plain - 1) / (tokens - 1)
            self._slope = _DECAY * self._slope + (1 - _DECAY) * slope

    def _length(self, chances: Sequence[Sequence[float]], most: int) -> int:
        rows = len(chances)
        step = self._fresh_seconds(rows, 1)
        if not step or not any(chances):
            return 0
        best, length = _LEAST_GAIN * rows / step, 0
        accepted, expected = [1.0] * rows, float(rows)
        for count in range(1, most + 1):
            for row, chance in enumerate(chances):
                accepted[row] *= chance[count - 1] if count <= len(chance) else 0.0
            expected += sum(accepted)
            rate = expected / self._time(rows, count + 1, step)
            if rate > best:
                best, length = rate, count
        return length

    def _time(self, rows: int, tokens: int, step: float) -> float:
        return self._fresh_seconds(rows, tokens) or step * (1 + self._slope * (tokens - 1))

    def _fresh_seconds(self, rows: int, tokens: int) -> float:
        """Returns the time of such a pass, or 0 if it was not measured recently."""
        seconds, last = self._measured.get((rows, tokens), (0.0, 0))
        return seconds if self._passes - last < _FRESH_PASSES else 0.0


def _mean(before: float, latest: float) -> float:
    return latest if not before else _DECAY * before + (1 - _DECAY) * latest
