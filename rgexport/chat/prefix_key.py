"""Keys of prefixes: their number of tokens, and a hash."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

Key = tuple[int, str]
"""Number of tokens, and their SHA-256 as int32, little-endian."""


def in_namespace(key: Key, namespace: str) -> Key:
    """Returns the key in a namespace, which does not reveal the keys in other namespaces."""
    if not namespace:
        return key
    return key[0], hashlib.sha256(f"{namespace}:{key[1]}".encode()).hexdigest()


def key_of(ids: Sequence[int] | np.ndarray) -> Key:
    (key,) = keys_of(ids, [len(ids)])
    return key


def keys_of(ids: Sequence[int] | np.ndarray, lengths: Iterable[int]) -> list[Key]:
    """Returns the keys of prefixes of rising lengths, hashed in one pass."""
    data, digest, start, keys = np.array(ids, "<i4"), hashlib.sha256(), 0, list[Key]()
    for length in lengths:
        digest.update(data[start:length].tobytes())
        start = length
        keys.append((length, digest.hexdigest()))
    return keys
