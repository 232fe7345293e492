"""How llama.cpp's SentencePiece tokenizer cuts text (llama-vocab.cpp), from a vocabulary alone.

First the special tokens, longest first; then, in what is left, the neighbours whose union has the
highest score are merged until none is a token. Characters that are none become bytes.
"""

import heapq
from collections.abc import Iterator

from rgexport.export.gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary


class Spm:
    """A tokenizer over a vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._scores = vocabulary.scores.tolist()
        self._types = vocabulary.types.tolist()
        self._ids = {token: index for index, token in enumerate(vocabulary.tokens)}
        kinds = (CONTROL, UNKNOWN, USER_DEFINED)
        special = [
            t for t, kind in zip(vocabulary.tokens, self._types, strict=True) if kind in kinds
        ]
        self._special = sorted(special, key=lambda text: -len(text.encode()))

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids, without BOS."""
        parts: list[str | int] = [text]
        for literal in self._special:
            index = self._ids[literal]
            if parse_special or self._types[index] == USER_DEFINED:
                parts = [piece for part in parts for piece in _split(part, literal, index)]
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._merge(part.replace(" ", "▁"))
        return ids

    def _merge(self, text: str) -> list[int]:
        pieces: list[str | None] = list(text)
        after = list(range(1, len(text) + 1))
        before = list(range(-1, len(text) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(pieces):
                union = f"{pieces[left]}{pieces[right]}"
                if (index := self._ids.get(union)) is not None:
                    heapq.heappush(queue, (-self._scores[index], left, right, union))

        for left in range(len(pieces) - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, union = heapq.heappop(queue)
            if None in (pieces[left], pieces[right]) or f"{pieces[left]}{pieces[right]}" != union:
                continue
            pieces[left], pieces[right] = union, None
            after[left] = after[right]
            if after[left] < len(pieces):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [index for piece in pieces if piece for index in self._index(piece)]

    def _index(self, piece: str) -> list[int]:
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in piece.encode()]


def _split(part: str | int, literal: str, index: int) -> Iterator[str | int]:
    if isinstance(part, int):
        yield part
        return
    for number, text in enumerate(part.split(literal)):
        if number:
            yield index
        if text:
            yield text
