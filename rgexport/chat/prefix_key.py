"""Names for the beginnings of texts: how many tokens, and their hash."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

Key = tuple[int, str]
"""Number of tokens, and the SHA-256 of them as int32, little-endian."""


def in_namespace(key: Key, namespace: str) -> Key:
    """The key in a namespace: it tells nothing of the keys of the same text in others."""
    if not namespace:
        return key
    return key[0], hashlib.sha256(f"{namespace}:{key[1]}".encode()).hexdigest()


def key_of(ids: Sequence[int] | np.ndarray) -> Key:
    """The key of these tokens."""
    (key,) = keys_of(ids, [len(ids)])
    return key


def keys_of(ids: Sequence[int] | np.ndarray, lengths: Iterable[int]) -> list[Key]:
    """The keys of prefixes of rising lengths, hashed in one pass."""
    data, hashed, start, found = np.array(ids, "<i4"), hashlib.sha256(), 0, list[Key]()
    for length in lengths:
        hashed.update(data[start:length].tobytes())
        start = length
        found.append((length, hashed.hexdigest()))
    return found
