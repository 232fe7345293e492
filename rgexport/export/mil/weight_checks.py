"""Whether the weights of a program lie where it says, and nothing else lies there.

Only headers are read, no weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rgexport.errors import RequestError
from rgexport.export.mil.blob import HEADER_BYTES, SENTINEL, BlobFile
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import FileValue, TensorType

ALIGNMENT = 64


@dataclass
class Use:
    """A blob that a program uses: the first operation that does, and the types it is given."""

    where: str
    types: list[TensorType] = field(default_factory=list)


def uses(package: Package) -> dict[str, dict[int, Use]]:
    """Weight file → offset of a blob's header → its use."""
    found: dict[str, dict[int, Use]] = {name: {} for name in package.blob_files}
    for function in package.functions.values():
        for operation in function.walk():
            for parameter, value in operation.constants:
                if isinstance(value, FileValue):
                    where = f"{function.name}: {operation.type} {operation.label}"
                    where += "" if parameter == "val" else f", {parameter}"
                    use = found[value.file].setdefault(value.offset, Use(where))
                    if value.type not in use.types:
                        use.types.append(value.type)
    return found


def check_weights(package: Package) -> Iterator[str]:
    """Headers, places and sizes of all blobs."""
    for name, blobs in uses(package).items():
        yield from _check_file(package.blob_files[name], dict(sorted(blobs.items())))


def _check_file(file: BlobFile, blobs: dict[int, Use]) -> Iterator[str]:
    """Each blob by itself, then what lies between them."""
    sound = True
    for offset, use in blobs.items():
        if offset % ALIGNMENT:
            yield f"{use.where}: its blob lies at {offset}, which is no multiple of {ALIGNMENT}"
        for kind in use.types:
            for complaint in file.complaints(offset, kind):
                yield f"{use.where}: {complaint}"
                sound = False
    overlapping = list(_overlaps(blobs))
    yield from overlapping
    if sound and not overlapping:
        yield from _gaps(file, blobs)


def _overlaps(blobs: dict[int, Use]) -> Iterator[str]:
    end, owner = HEADER_BYTES, "the head of the file"
    for offset, use in blobs.items():
        if offset < end:
            yield f"{use.where}: its blob at {offset} overlaps that of {owner}, which ends at {end}"
        stop = offset + HEADER_BYTES + max(kind.nbytes for kind in use.types)
        if stop > end:
            end, owner = stop, use.where


def _gaps(file: BlobFile, blobs: dict[int, Use]) -> Iterator[str]:
    """Walks from blob to blob, and tells of what the program does not use."""
    at, held, name = HEADER_BYTES, 0, file.path.name
    while at < file.size:
        size = _blob_at(file, at)
        if size is None:
            following = min((offset for offset in blobs if offset > at), default=file.size)
            yield f"{name} has {following - at} bytes at {at} that are no blob"
            at = following
            continue
        if at not in blobs:
            yield f"{name} has a blob of {size - HEADER_BYTES} bytes at {at} that nothing uses"
        held += 1
        at = _aligned(at + size)
    if held != file.count:
        yield f"{name} says that it has {file.count} blobs; it has {held}"


def _blob_at(file: BlobFile, offset: int) -> int | None:
    """Bytes of the blob at `offset` with its header; None if there is none."""
    try:
        header = file.header(offset)
    except RequestError:
        return None
    whole = header.sentinel == SENTINEL and header.data_offset == offset + HEADER_BYTES
    return HEADER_BYTES + header.nbytes if whole else None


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
