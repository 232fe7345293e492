"""Checks all values of a checkpoint, and hashes its weight files."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord, hash_file
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.huggingface import HEAD
from rgexport.griffin.inventory import summarize
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
"""File name → hash and size."""


@dataclass(frozen=True)
class CheckReport:
    """All problems of a checkpoint (each `kind: details`), and the hashes of its weight files."""

    problems: tuple[str, ...]
    hashes: FileHashes


def require_sound(checkpoint: Checkpoint) -> FileHashes:
    """Checks everything and returns the hashes of the weight files.

    Raises:
        RequestError: there are problems; the message names them all.
    """
    report = check_checkpoint(checkpoint)
    if report.problems:
        count = len(report.problems)
        raise RequestError(
            f"{checkpoint.path} cannot be used, it has {count} "
            f"problem{'s' * (count != 1)}: {summarize(report.problems)}"
        )
    return report.hashes


def check_checkpoint(checkpoint: Checkpoint) -> CheckReport:
    """Checks that values are finite and the head equals the embedding; hashes the weight files.

    Raises:
        RequestError: a file cannot be read.
    """
    try:
        return _check(checkpoint)
    except OSError as error:
        raise RequestError(
            f"{error.filename or checkpoint.path} cannot be read: {error.strerror}"
        ) from None


def _check(checkpoint: Checkpoint) -> CheckReport:
    files, head = checkpoint.weight_files, checkpoint.head
    work = sum(path.stat().st_size for path in files.values())
    work += sum(t.nbytes for t in checkpoint.weights.values()) + (head.nbytes if head else 0)
    with task("Checking the weights", work) as advance, ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda path: hash_file(path, advance), files.values())
        scans = pool.map(
            lambda name: _scan(name, checkpoint.weights[name], advance), checkpoint.weights
        )
        tied = pool.submit(_compare_head, checkpoint, advance)
        found = [problem for problem in [*scans, tied.result()] if problem]
        hashes = dict(zip(files, digests, strict=True))
    return CheckReport((*checkpoint.problems, *found), hashes)


def _scan(name: str, tensor: RowTensor, advance: Advance) -> str | None:
    """The problem of a tensor with values that are not finite, if there are any."""
    count, first = 0, 0
    is_bad = _finder(tensor.dtype)
    for start, rows in tensor.slabs(SLAB_BYTES):
        bad = is_bad(rows)
        if bad is not None:
            first = first if count else start + int(bad.reshape(len(rows), -1).any(1).argmax())
            count += int(bad.sum())
        advance(rows.nbytes)
    if not count:
        return None
    return f"NaN/Inf: {name} ({count} value{'s' * (count != 1)}, the first in row {first})"


def _finder(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray | None]:
    """A function that returns the mask of NaNs and infinities, or None if there are none.

    It compares bits, because numpy has no fast test for bfloat16.
    """
    integer, mask, infinity = _EXPONENTS[dtype]
    scratch: np.ndarray = np.empty(0, integer)

    def find(rows: np.ndarray) -> np.ndarray | None:
        nonlocal scratch
        if len(scratch) < rows.size:
            scratch = np.empty(rows.size, integer)
        bits = scratch[: rows.size]
        np.bitwise_and(rows.reshape(-1).view(integer), integer(mask), out=bits)
        if bits.max() < infinity:
            return None
        return (bits >= infinity).reshape(rows.shape)

    return find


def _compare_head(checkpoint: Checkpoint, advance: Advance) -> str | None:
    """The problem of a saved head that differs from the embedding, if it does."""
    head, embedding = checkpoint.head, checkpoint.weights.get(EMBEDDING)
    if head is None or embedding is None:
        return None
    differing = 0
    for start, rows in head.slabs(SLAB_BYTES):
        other = embedding.read(start, start + len(rows))
        if rows.dtype != other.dtype or rows.tobytes() != other.tobytes():
            unequal = rows.astype(np.float32) != other.astype(np.float32)
            differing += int(unequal.any(axis=1).sum())
        advance(rows.nbytes)
    if not differing:
        return None
    return (
        f"untied head: {HEAD} differs from {EMBEDDING} in {differing} of {head.shape[0]} rows "
        "(expected a copy)"
    )
