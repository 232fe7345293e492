"""Drafts of the next tokens by prompt lookup.

Edits of a text, and answers about a text, repeat much of it. So a draft follows an earlier
occurrence of the last tokens, and the model checks the draft in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_GRAM = 2
"""Number of tokens that must match, at least; they are the key of the index."""

_MAX_POSITIONS = 8
"""Number of occurrences that the index keeps for a key."""

_MAX_INDEXED = 1 << 16
"""Number of last tokens that are indexed when a text is longer."""

_INDEXED_AT_ONCE = 512
"""Tokens that one step indexes: indexing must not delay the first token of a reply."""

_PRIOR = {2: 0.15, 3: 0.3, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.75, 8: 0.8}
"""Length of the match → prior probability that the next token matches, too."""

_LONGEST_MATCH = max(_PRIOR)
"""Longer matches are not more reliable."""

_PRIOR_WEIGHT = 2.0
"""Number of observations that the prior counts for."""

_RATE_DECAY = 0.95
"""Weight of an observation relative to the next one."""


@dataclass(frozen=True)
class Draft:
    """Drafted tokens, and the number of tokens before them that matched the end of the text."""

    tokens: Sequence[int] = ()
    match: int = 0


class PromptLookup:
    """An index of one reply's texts that drafts its next tokens.

    It is not thread-safe: only the scheduler's thread uses it.
    """

    def __init__(self, ids: Sequence[int], source: Sequence[int] = ()) -> None:
        """Takes the prompt with the reply so far, which may grow, and a text that may repeat."""
        self._ids = ids
        self._texts = (source, ids)
        self._indexed = [max(_GRAM, len(text) - _MAX_INDEXED) for text in self._texts]
        self._positions: dict[int, list[int]] = {}
        """Key → its last occurrences, as 2 × end + text: numbers take less memory than pairs."""
        self._accepted = {match: _PRIOR_WEIGHT * chance for match, chance in _PRIOR.items()}
        self._tried = dict.fromkeys(_PRIOR, _PRIOR_WEIGHT)

    def draft(self, max_tokens: int) -> Draft:
        """Returns the tokens after the last occurrence with the longest match."""
        self._index()
        text, end, match = self._longest_match()
        if not match:
            return Draft()
        ids = self._texts[text]
        if ids is not self._ids:
            return Draft(ids[end : end + max_tokens], match)
        # A text that repeats itself is expected to go on repeating: the draft wraps around.
        period = len(ids) - end
        tokens = [ids[end + i % period] for i in range(max_tokens)]
        return Draft(tokens, match)

    def chances(self, draft: Draft) -> list[float]:
        """Returns for each token its probability to be accepted if those before it are."""
        rates = []
        for index in range(len(draft.tokens)):
            match = min(draft.match + index, _LONGEST_MATCH)
            rates.append(self._accepted[match] / self._tried[match])
        return rates

    def learn(self, draft: Draft, tokens: Sequence[int]) -> None:
        """Updates the rates with the tokens that followed, whether the draft was tried or not."""
        for index, (drafted, token) in enumerate(zip(draft.tokens, tokens, strict=False)):
            is_accepted = drafted == token
            match = min(draft.match + index, _LONGEST_MATCH)
            self._accepted[match] = _RATE_DECAY * self._accepted[match] + is_accepted
            self._tried[match] = _RATE_DECAY * self._tried[match] + 1
            if not is_accepted:
                return

    def _index(self) -> None:
        """Indexes the next tokens of both texts."""
        for text, ids in enumerate(self._texts):
            start = self._indexed[text]
            stop = min(len(ids), start + _INDEXED_AT_ONCE)
            for end in range(start, stop):
                positions = self._positions.setdefault(_key(ids, end), [])
                positions.append(2 * end + text)
                if len(positions) > _MAX_POSITIONS:
                    del positions[0]
            self._indexed[text] = max(start, stop)

    def _longest_match(self) -> tuple[int, int, int]:
        """Returns the text, the end and the length of the best occurrence; length 0 for none."""
        best = (0, 0, 0)
        if len(self._ids) < _GRAM:
            return best
        key = _key(self._ids, len(self._ids))
        for position in reversed(self._positions.get(key, [])):
            end, text = divmod(position, 2)
            match = self._match_length(text, end)
            if match > best[2]:
                best = (text, end, match)
        return best

    def _match_length(self, text: int, end: int) -> int:
        """Returns how many tokens before `end` are equal to the last tokens of the reply."""
        ids = self._texts[text]
        limit = min(_LONGEST_MATCH, end, len(self._ids))
        for length in range(limit):
            if ids[end - 1 - length] != self._ids[-1 - length]:
                return length
        return limit


def _key(ids: Sequence[int], end: int) -> int:
    """Returns the last `_GRAM` tokens before `end` as one number: quick, and small in memory."""
    return ids[end - 2] << 32 | ids[end - 1]
