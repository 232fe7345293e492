"""Checks all values of a checkpoint, and hashes its weight files."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord, hash_file
from rgexport.griffin.checkpoint import Checkpoint, summarize
from rgexport.griffin.huggingface import HEAD
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.tensor import DTYPES, RowTensor
from rgexport.progress import Advance, task

SLAB_BYTES = 4 << 20
"""Small enough to stay in the processor's cache between the passes over a slab."""
THREADS = 2
"""Hashing is bound by the processor, and reads by memory: more threads gain little."""

_EXPONENTS: dict[np.dtype, tuple[type, int, int]] = {
    DTYPES["bfloat16"]: (np.uint16, 0x7FFF, 0x7F80),
    DTYPES["float16"]: (np.uint16, 0x7FFF, 0x7C00),
    DTYPES["float32"]: (np.uint32, 0x7FFFFFFF, 0x7F800000),
}
"""dtype → integer view, mask of all but the sign, bits of infinity; above those lie the NaNs."""

FileHashes = dict[str, FileRecord]


@dataclass(frozen=True)
class CheckReport:
    problems: tuple[str, ...]
    hashes: FileHashes


def require_sound(checkpoint: Checkpoint) -> FileHashes:
    """Returns the hashes of the weight files; RequestError names all problems."""
    report = check_checkpoint(checkpoint)
    if report.problems:
        count = len(report.problems)
        has = f"it has {count} problem{'s' * (count != 1)}: {summarize(report.problems)}"
        raise RequestError(f"{checkpoint.path} cannot be used, {has}")
    return report.hashes


def check_checkpoint(checkpoint: Checkpoint) -> CheckReport:
    """Checks that values are finite and the head equals the embedding; hashes the files."""
    files, weights, head = checkpoint.weight_files, checkpoint.weights, checkpoint.head
    try:
        size = sum(path.stat().st_size for path in files.values())
        total = size + sum(t.nbytes for t in weights.values()) + (head.nbytes if head else 0)
        with task("Checking the weights", size) as count, ThreadPoolExecutor(THREADS) as pool:
            advance = _scaled(count, total, size)
            digests = pool.map(lambda path: hash_file(path, advance), files.values())
            scans = pool.map(lambda name: _find_non_finite(name, weights[name], advance), weights)
            tied = pool.submit(_compare_head, checkpoint, advance)
            problems = [problem for problem in [*scans, tied.result()] if problem]
            hashes = dict(zip(files, digests, strict=True))
    except OSError as error:
        raise RequestError(
            f"{error.filename or checkpoint.path} cannot be read: {error.strerror}"
        ) from None
    return CheckReport((*checkpoint.problems, *problems), hashes)


def _scaled(advance: Advance, total: int, size: int) -> Advance:
    """Returns a function that counts `total` bytes as `size`, since most are read twice."""
    lock, done = Lock(), 0

    def scaled(step: int) -> None:
        nonlocal done
        with lock:
            before, done = done, done + step
            advance(done * size // total - before * size // total)

    return scaled


def _find_non_finite(name: str, tensor: RowTensor, advance: Advance) -> str | None:
    """Compares bits, because numpy has no fast test for bfloat16."""
    integer, mask, infinity = _EXPONENTS[tensor.dtype]
    count, first = 0, 0
    scratch: np.ndarray = np.empty(0, integer)
    for start, rows in tensor.slabs(SLAB_BYTES):
        if len(scratch) < rows.size:
            scratch = np.empty(rows.size, integer)
        bits = scratch[: rows.size]
        np.bitwise_and(rows.reshape(-1).view(integer), integer(mask), out=bits)
        if bits.max() >= infinity:
            bad = (bits >= infinity).reshape(len(rows), -1)
            first = first if count else start + int(bad.any(1).argmax())
            count += int(bad.sum())
        advance(rows.nbytes)
    if not count:
        return None
    return f"NaN/Inf: {name} ({count} value{'s' * (count != 1)}, the first in row {first})"


def _compare_head(checkpoint: Checkpoint, advance: Advance) -> str | None:
    head, embedding = checkpoint.head, checkpoint.weights.get(EMBEDDING)
    if head is None or embedding is None:
        return None
    differing = 0
    for start, rows in head.slabs(SLAB_BYTES):
        copied = embedding.read(start, start + len(rows))
        if rows.dtype != copied.dtype or rows.tobytes() != copied.tobytes():
            unequal = rows.astype(np.float32) != copied.astype(np.float32)
            differing += int(unequal.any(axis=1).sum())
        advance(rows.nbytes)
    if not differing:
        return None
    return (
        f"untied head: {HEAD} differs from {EMBEDDING} in {differing} of {head.shape[0]} rows "
        "(expected a copy)"
    )
