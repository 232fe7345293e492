"""Prompt lookup: what a text may go on with, from where its last tokens stand earlier.

Whoever edits a text, or answers from one, writes much that is there already. What came after the
same tokens before is a draft, which a model checks in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_GRAM = 2
"""Tokens that must be the same, at least."""
_PLACES = 8
"""Where each such sequence stood last: so many places are compared."""
_KNOWN, _AT_ONCE = 1 << 16, 512
"""Tokens of a longer text that are known, its last ones; those that a step takes in, which must not
keep a first token waiting."""
_PRIOR = {2: 0.15, 3: 0.3, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.75, 8: 0.8}
"""Tokens that are the same → the chance that the next one is too, before anything is known."""
_LONGEST = max(_PRIOR)
"""Where more are the same, a draft is no surer."""
_PRIOR_WEIGHT, _MEMORY = 2.0, 0.95
"""Observations that the prior counts for; what an observation still counts after the next one."""


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, because so many before them are the same as elsewhere."""

    tokens: Sequence[int] = ()
    match: int = 0


class Lookup:
    """Drafts for one text, and how often they were right."""

    def __init__(self, ids: Sequence[int], source: Sequence[int] = ()) -> None:
        """Begins with the text so far, a list that grows, and another that it may repeat."""
        self._ids, self._texts = ids, (source, ids)
        self._indexed = [max(_GRAM, len(text) - _KNOWN) for text in self._texts]
        self._places: dict[int, list[int]] = {}
        self._right = {match: _PRIOR_WEIGHT * chance for match, chance in _PRIOR.items()}
        self._seen = dict.fromkeys(_PRIOR, _PRIOR_WEIGHT)

    def draft(self, most: int) -> Draft:
        """At most so many tokens, from the place where most before it is the same, or the last."""
        self._index()
        if len(self._ids) < _GRAM:
            return Draft()
        text, end, match = 0, 0, 0
        for place in reversed(self._places.get(_key(self._ids, len(self._ids)), [])):
            found = self._match(place % 2, place // 2)
            if found > match:
                text, end, match = place % 2, place // 2, found
        if not match:
            return Draft()
        ids = self._texts[text]
        if ids is not self._ids:
            return Draft(ids[end : end + most], match)
        # A text that repeats itself goes on to do so: the draft continues into itself.
        period = len(ids) - end
        return Draft([ids[end + i % period] for i in range(most)], match)

    def chances(self, draft: Draft) -> list[float]:
        """Of each token of a draft, how likely it is right if those before it are."""
        places = (min(draft.match + i, _LONGEST) for i in range(len(draft.tokens)))
        return [self._right[place] / self._seen[place] for place in places]

    def learn(self, draft: Draft, came: Sequence[int]) -> None:
        """Counts what came instead of a draft, whether that was tried or not."""
        for i, (drafted, token) in enumerate(zip(draft.tokens, came, strict=False)):
            place = min(draft.match + i, _LONGEST)
            self._right[place] = _MEMORY * self._right[place] + (drafted == token)
            self._seen[place] = _MEMORY * self._seen[place] + 1
            if drafted != token:
                return

    def _index(self) -> None:
        """Notes the places that something has come after."""
        for text, ids in enumerate(self._texts):
            stop = min(len(ids), self._indexed[text] + _AT_ONCE)
            for end in range(self._indexed[text], stop):
                places = self._places.setdefault(_key(ids, end), [])
                places.append(2 * end + text)
                if len(places) > _PLACES:
                    del places[0]
            self._indexed[text] = max(self._indexed[text], stop)

    def _match(self, text: int, end: int) -> int:
        """How many tokens before a place are the last ones of the text, as far as that counts."""
        ids, most = self._texts[text], min(_LONGEST, end, len(self._ids))
        same = (ids[end - 1 - i] == self._ids[-1 - i] for i in range(most))
        return next((i for i, equal in enumerate(same) if not equal), most)


def _key(ids: Sequence[int], end: int) -> int:
    """The last `_GRAM` tokens before a place as one number: quick, and small in memory."""
    return ids[end - 2] << 32 | ids[end - 1]
