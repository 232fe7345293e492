"""SHA-256 of files, and a cache of those computed before, which opens artifacts much faster."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgexport import progress
from rgexport.errors import RequestError
from rgexport.files.atomic import replacing
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.progress import Advance

_BLOCK = 1 << 20
_LONG = 4 << 30  # bytes from which hashing shows a progress bar: it takes some two seconds
_MAX_ENTRIES = 2048  # entries of the cache; the oldest are dropped first

_Key = tuple[int, ...]  # the state of a file: size, mtime and ctime in ns
_Cache = dict[str, Any]  # name of a file → its state as a list, and its hash


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    size: int


def hash_file(
    path: Path, advance: Advance = lambda done: None, start: int = 0, length: int | None = None
) -> FileRecord:
    """Hashes `length` bytes of a file from byte `start`, or all; reports progress to `advance`."""
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(block if length is None else block[: length - size]):
            digest.update(block[:count])
            size += count
            advance(count)
    return FileRecord(digest.hexdigest(), size)


def hash_files(paths: Iterable[Path], *, start: int = 0) -> dict[Path, str]:
    files = list(paths)
    total = sum(path.stat().st_size for path in files)
    silent = nullcontext(lambda done: None)
    bar = progress.task("Checking hashes", total) if total >= _LONG else silent
    with bar as advance, ThreadPoolExecutor() as pool:
        records = pool.map(lambda path: hash_file(path, advance, start), files)
        return {path: record.sha256 for path, record in zip(files, records, strict=True)}


def hash_new_files(paths: Iterable[Path], *, start: int = 0) -> dict[Path, str]:
    """Hashes files from byte `start` on; the cache has the hashes of unchanged files."""
    keys = {path: _key(path) for path in paths}
    known, hashes = _read_cache(), dict[Path, str]()
    for path, key in keys.items():
        match known.get(_name(path, start)):
            case [list(state), str(digest)] if tuple(state) == key:
                hashes[path] = digest
    if missing := keys.keys() - hashes.keys():
        new = hash_files(missing, start=start)
        hashes |= new
        unchanged = {path: digest for path, digest in new.items() if _key(path) == keys[path]}
        remember_hashes(unchanged, start=start)
    return hashes


def remember_hashes(hashes: Mapping[Path, str], *, start: int = 0) -> None:
    """Adds hashes of files, from byte `start` on, to the cache, unless it cannot be written."""
    entries = {_name(path, start): (_key(path), digest) for path, digest in hashes.items()}
    known = _read_cache()
    for name in entries:
        known.pop(name, None)  # so that it becomes the newest
    newest = dict(list((known | entries).items())[-_MAX_ENTRIES:])
    cache = _cache_file()
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as partial:
            partial.write_text(json.dumps(newest), "utf-8")


def _cache_file() -> Path:
    folder = os.environ.get("RGEXPORT_CACHE")
    if not folder:
        from platformdirs import user_cache_dir

        folder = user_cache_dir("rgexport")
    return Path(folder) / "verified.json"


def _read_cache() -> _Cache:
    try:
        # As text, since paths that are not UTF-8 have lone surrogates.
        cache = parse_json(read_regular(_cache_file()).decode())
    except (OSError, ValueError, RequestError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _name(path: Path, start: int) -> str:
    return os.path.realpath(path) + (f"@{start}" if start else "")


def _key(path: Path) -> _Key:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
