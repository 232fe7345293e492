"""Makes mapped files of weights resident, on Linux, in the background.

Where weights stay in their mapped file, each first touch of 64 kB is a page fault: a third of a
second for a 2B, spread over the first tokens. `madvise(MADV_POPULATE_READ)` (Linux 5.14) does it in
a tenth of that, and reads ahead what is still on the disk. It is advice: where it fails, nothing is
lost but speed.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rgexport.runtimes.mappings import Mapping, advise, mappings
from rgexport.runtimes.memory import available_bytes

_MADV_WILLNEED, _MADV_POPULATE_READ = 3, 22
_PIECE = 16 << 20
"""At once: others wait who want to map memory meanwhile."""
_PAGE = 4096


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    file: Path
    start: int
    end: int


@contextmanager
def resident(folder: Path, leave_out: Sequence[Extent] = ()) -> Iterator[None]:
    """Begins to make what the block has mapped of a folder's files resident when it ends.

    What is mapped twice would count twice in the memory of the process, and `leave_out` names what
    is.
    """
    before = set(_of(folder))
    yield
    mapped = [mapping for mapping in _of(folder) if mapping not in before]
    pieces = [piece for mapping in mapped for piece in _pieces(mapping, leave_out)]
    if pieces:
        threading.Thread(target=_populate, args=(pieces,), daemon=True).start()


def _of(folder: Path) -> Iterator[Mapping]:
    prefix = f"{folder.resolve()}/"
    return (mapping for mapping in mappings() if mapping.file.startswith(prefix))


def _pieces(mapping: Mapping, leave_out: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    """First addresses and ends of what is to be made resident of a mapping."""
    shift = mapping.start - mapping.offset
    holes = [
        (extent.start + shift, extent.end + shift)
        for extent in leave_out
        if str(extent.file.resolve()) == mapping.file
    ]
    at = mapping.start
    for first, end in sorted(holes):
        yield from _cut(at, min(first, mapping.end))
        at = max(at, end)
    yield from _cut(at, mapping.end)


def _cut(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Whole pages that lie between both, some at a time."""
    start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
    for at in range(start, end, _PIECE):
        yield at, min(at + _PIECE, end)


def _populate(pieces: Sequence[tuple[int, int]]) -> None:
    """Where memory is short, what is read now would have to make room for the rest."""
    room = available_bytes()
    if room is not None and room < sum(end - start for start, end in pieces):
        return
    for start, end in pieces:
        _ = advise(start, end, _MADV_POPULATE_READ) or advise(start, end, _MADV_WILLNEED)
