"""Hashes of files, and a memory of those that were computed before.

The memory makes opening a 2B in int4 fourteen times faster (`bench/system_tricks.py`): a second
less before each command, and nothing is read from the disk.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from rgexport import progress
from rgexport.files.hashing import hash_file

_LONG = 4 << 30
"""Bytes from which hashing is worth a progress bar: some two seconds."""
_REMEMBERED = 2048
"""Files that the memory holds at most; the longest unseen are forgotten first."""

_Key = tuple[int, int, int]
"""What tells that a file is the one that was hashed: size, mtime and ctime in ns."""
_passing: dict[str, tuple[_Key, str]] = {}
"""Entries for as long as a `trusted_within` lasts."""


def hash_files(paths: Iterable[Path], *, start: int = 0) -> dict[Path, str]:
    """SHA-256 of each file from byte `start` on, in hexadecimal; large ones show their progress."""
    files = list(paths)
    total = sum(path.stat().st_size for path in files)
    shown = progress.task("Checking hashes", total) if total >= _LONG else nullcontext(_silent)
    with shown as advance, ThreadPoolExecutor() as pool:
        records = pool.map(lambda path: hash_file(path, advance, start), files)
        return {path: record.sha256 for path, record in zip(files, records, strict=True)}


def hash_new_files(paths: Iterable[Path], *, start: int = 0) -> dict[Path, str]:
    """As `hash_files`, but reads only files that were not seen before in their present state."""
    keys = {path: _key(path) for path in paths}
    known = _load() | _passing
    names = {path: _name(path, start) for path in keys}
    hashes = {
        path: known[name][1]
        for path, name in names.items()
        if name in known and known[name][0] == keys[path]
    }
    missing = keys.keys() - hashes.keys()
    if missing:
        found = hash_files(missing, start=start)
        hashes |= found
        unchanged = {path: digest for path, digest in found.items() if _key(path) == keys[path]}
        remember(unchanged, start=start)
    return hashes


def remember(hashes: Mapping[Path, str], *, start: int = 0) -> None:
    """Notes hashes that the caller has just computed. Failure to do so is harmless."""
    _note({_name(path, start): (_key(path), digest) for path, digest in hashes.items()})


@contextmanager
def trusted_within(hashes: Mapping[Path, str], *, start: int = 0) -> Iterator[None]:
    """While the block runs, files need no hashing; no trace of them is left in the memory.

    For files that are complete but not yet in their place, by one thread at a time.

    Args:
        hashes: as for `remember`.
        start: as for `hash_files`.
    """
    _passing.update({_name(path, start): (_key(path), digest) for path, digest in hashes.items()})
    try:
        yield
    finally:
        _passing.clear()


def _note(entries: Mapping[str, tuple[_Key, str]]) -> None:
    known = _load()
    for name, entry in entries.items():
        known.pop(name, None)
        known[name] = entry
    newest = dict(list(known.items())[-_REMEMBERED:])
    partial = _memory().with_suffix(f".{secrets.token_hex(4)}")
    with suppress(OSError):
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(newest), "utf-8")
            partial.replace(_memory())
        finally:
            partial.unlink(missing_ok=True)


def _silent(_: int) -> None:
    """Progress that nobody needs to see."""


def _memory() -> Path:
    folder = os.environ.get("RGEXPORT_CACHE")
    if not folder:
        from platformdirs import user_cache_dir

        folder = user_cache_dir("rgexport")
    return Path(folder) / "verified.json"


def _load() -> dict[str, tuple[_Key, str]]:
    """The memory; an unreadable one counts as empty."""
    try:
        entries = json.loads(_memory().read_text("utf-8"))
        return {name: (tuple(key), str(digest)) for name, (key, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _name(path: Path, start: int) -> str:
    return os.path.realpath(path) + (f"@{start}" if start else "")


def _key(path: Path) -> _Key:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
