"""Cuts texts into blocks so small that the logits of a block fit into memory."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

from rgexport.runtimes.session import Session

LOGITS_BYTES = 192 << 20
"""Logits of a block of positions, in two copies."""
MAX_BLOCK = 512
_MIN_BLOCK = 8


def block_size(session: Session) -> int:
    """Returns how many rows of logits fit into `LOGITS_BYTES`, in whole chunks if possible."""
    size = min(MAX_BLOCK, max(_MIN_BLOCK, LOGITS_BYTES // (2 * 4 * session.vocab_size)))
    chunk = session.info.prefill_chunk
    return size - size % chunk if session.info.whole_chunks and size > chunk else size


def whole_chunks(session: Session, positions: Iterable[int]) -> set[int]:
    """Returns the positions between chunks of fixed length; all, if chunks have any length."""
    whole = session.info.prefill_chunk if session.info.whole_chunks else 1
    return {position for position in positions if position % whole == 0}


def blocks(session: Session, edges: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields the first position and the end of each block; every edge ends a block."""
    size = block_size(session)
    for first, last in pairwise(sorted({0, *edges})):
        for start in range(first, last, size):
            yield start, min(start + size, last)
