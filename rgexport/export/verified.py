"""SHA-256 of files, and a cache of hashes that were computed before.

The cache makes opening a 2B in int4 fourteen times faster (`bench/system_tricks.py`): a second
less before each command, and nothing is read from the disk.
"""

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

from rgexport import progress
from rgexport.files.hashing import hash_file

_LONG = 4 << 30
"""Bytes from which hashing shows a progress bar: it takes some two seconds."""
_MAX_ENTRIES = 2048
"""Entries of the cache; the oldest are dropped first."""

_Key = tuple[int, int, int]
"""The state of a file: size, mtime and ctime in ns."""
_Entries = dict[str, tuple[_Key, str]]


def hash_files(paths: Iterable[Path], *, start: int = 0) -> dict[Path, str]:
    """SHA-256 of each file from byte `start` on, in hexadecimal; large files show progress."""
    files = list(paths)
    total = sum(path.stat().st_size for path in files)
    silent = nullcontext(lambda done: None)
    shown = progress.task("Checking hashes", total) if total >= _LONG else silent
    with shown as advance, ThreadPoolExecutor() as pool:
        records = pool.map(lambda path: hash_file(path, advance, start), files)
        return {path: record.sha256 for path, record in zip(files, records, strict=True)}


def hash_new_files(paths: Iterable[Path], *, start: int = 0) -> dict[Path, str]:
    """As `hash_files`, but reads only files that are not in the cache in their present state."""
    keys = {path: _key(path) for path in paths}
    known, names = _load(), {path: _name(path, start) for path in keys}
    hashes = {
        path: known[name][1]
        for path, name in names.items()
        if name in known and known[name][0] == keys[path]
    }
    if missing := keys.keys() - hashes.keys():
        found = hash_files(missing, start=start)
        hashes |= found
        unchanged = {path: digest for path, digest in found.items() if _key(path) == keys[path]}
        remember(unchanged, start=start)
    return hashes


def remember(hashes: Mapping[Path, str], *, start: int = 0) -> None:
    """Adds to the cache what the caller has just computed; a cache that cannot be written is left.

    Args:
        hashes: file → its hash from byte `start` on.
        start: see above.
    """
    entries = {_name(path, start): (_key(path), digest) for path, digest in hashes.items()}
    known = _load()
    for name in entries:
        known.pop(name, None)  # so that it becomes the newest
    newest = dict(list((known | entries).items())[-_MAX_ENTRIES:])
    partial = _cache_file().with_suffix(f".{secrets.token_hex(4)}")
    with suppress(OSError):
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(newest), "utf-8")
            partial.replace(_cache_file())
        finally:
            partial.unlink(missing_ok=True)


def _cache_file() -> Path:
    folder = os.environ.get("RGEXPORT_CACHE")
    if not folder:
        from platformdirs import user_cache_dir

        folder = user_cache_dir("rgexport")
    return Path(folder) / "verified.json"


def _load() -> _Entries:
    """The cache; one that cannot be read counts as empty."""
    try:
        entries = json.loads(_cache_file().read_text("utf-8"))
        return {name: (tuple(key), str(digest)) for name, (key, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _name(path: Path, start: int) -> str:
    return os.path.realpath(path) + (f"@{start}" if start else "")


def _key(path: Path) -> _Key:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
