"""Prompt lookup: drafts the next tokens of a text from an earlier occurrence of its last tokens.

Edits of a text, and answers about a text, repeat much of it. The model checks a draft in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_GRAM = 2
"""Number of tokens that must match, at least; they are the key of the index."""
_MOST_POSITIONS = 8
"""Occurrences of a key that are remembered, and compared."""
_MOST_INDEXED = 1 << 16
"""Last tokens of a longer text that are indexed."""
_INDEXED_AT_ONCE = 512
"""Tokens that one step indexes: indexing must not delay the first token of a reply."""
_PRIOR = {2: 0.15, 3: 0.3, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.75, 8: 0.8}
"""Length of the match → prior probability that the next token matches, too."""
_LONGEST = max(_PRIOR)
"""Longer matches are not more reliable."""
_PRIOR_WEIGHT, _DECAY = 2.0, 0.95
"""Observations that the prior counts for; weight of an observation relative to the next one."""


@dataclass(frozen=True)
class Draft:
    """Proposed next tokens, and the number of equal tokens before them."""

    tokens: Sequence[int] = ()
    match: int = 0


class PromptLookup:
    def __init__(self, ids: Sequence[int], source: Sequence[int] = ()) -> None:
        """Takes the text so far, a list that grows, and another text that it may repeat."""
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
            self._accepted[match] = _DECAY * self._accepted[match] + (drafted == token)
            self._tried[match] = _DECAY * self._tried[match] + 1
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
        """Returns how many tokens before `end` equal the last ones, up to `_LONGEST`."""
        ids, most = self._texts[text], min(_LONGEST, end, len(self._ids))
        equal = (ids[end - 1 - i] == self._ids[-1 - i] for i in range(most))
        return next((i for i, is_equal in enumerate(equal) if not is_equal), most)


def _key(ids: Sequence[int], end: int) -> int:
    """Returns the last `_GRAM` tokens before `end` as one number: quick, and small in memory."""
    return ids[end - 2] << 32 | ids[end - 1]
