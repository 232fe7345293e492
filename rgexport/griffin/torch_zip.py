"""The zip archive that `torch.save` writes: where its storages lie, and its pickle unread.

Whatever torch would unpack, read by another name or refuse is refused before torch sees it.
"""

import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.files.regular_file import require_regular

_STORAGE = re.compile(r".+/data/\d+")
_PICKLE = "/data.pkl"
_PLAIN = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)|collections OrderedDict|torch \w+Storage"
)
MAX_SMALL_BYTES = 4096
"""Of a record that is neither the pickle nor a storage, such as the byte order."""
MAX_PICKLE_BYTES = 16 << 20
"""Of a file without its storages: far above what a model needs."""
_FOREIGN = 0x61  # flags of a zip record: encrypted, a patch, strongly encrypted
_FOLDER = 0x10  # attribute of a zip record
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip record: its signature, and the lengths of the name and the extra field behind it."""


@dataclass(frozen=True)
class TorchZip:
    """`folder` has its pickle, which names nothing but tensors; `storages` their place and size."""

    folder: str
    pickle: bytes
    storages: dict[str, tuple[int, int]]


def open_zip(path: Path) -> TorchZip:
    """Reads the directory of a file and its pickle.

    Raises:
        RequestError: no such file, a damaged or legacy one, or a pickle that could run code.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise _not_zip(path)
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                info = _check_records(records)
                offset, size = _record(file, info)
                file.seek(offset)
                stream = file.read(size)
                _check_names(path, stream)
                storages = [i for i in records if _STORAGE.fullmatch(i.filename)]
                places = {i.filename: _record(file, i) for i in storages}
                return TorchZip(info.filename.removesuffix(_PICKLE), stream, places)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except RequestError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged directory leads it to
        raise RequestError(
            f"{path} is damaged: {first_line(error)}; copy or download it again"
        ) from None


def _check_records(records: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    """The pickle. All but the storages is read whole by torch, which would also unpack it.

    Raises:
        BadZipFile: a record is compressed, there twice, or larger than any pickle of names; there
            is no pickle, or one that torch finds by another name, for it takes DATA.PKL as well.
    """
    for info in records:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise zipfile.BadZipFile(f"its record {info.filename} is compressed")
        if info.flag_bits & _FOREIGN:
            raise zipfile.BadZipFile(f"its record {info.filename} is encrypted or a patch")
        if info.external_attr & _FOLDER:  # torch would not read it, and tell nobody
            raise zipfile.BadZipFile(f"its record {info.filename} is said to be a folder")
        most = MAX_PICKLE_BYTES if info.filename.endswith(_PICKLE) else MAX_SMALL_BYTES
        if info.file_size > most and not _STORAGE.fullmatch(info.filename):
            raise zipfile.BadZipFile(f"its record {info.filename} has {info.file_size} bytes")
    if len({info.filename for info in records}) < len(records):
        raise zipfile.BadZipFile("it has a record twice")
    pickles = [info for info in records if info.filename.lower().endswith(_PICKLE)]
    if len(pickles) != 1 or not pickles[0].filename.endswith(_PICKLE):
        found = ", ".join(info.filename for info in pickles[:4]) or "none"
        raise zipfile.BadZipFile(f"it needs one pickle {_PICKLE[1:]}, and has {found}")
    return pickles[0]


def _not_zip(path: Path) -> RequestError:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"\x80"):
        return RequestError(
            f"{path} is in torch's legacy format; expected the zip format of torch ≥ 1.6: "
            "load it with weights_only=True and save it again"
        )
    if start == b"PK\x03\x04":
        return RequestError(f"{path} is truncated; copy or download it again")
    return RequestError(f"{path} is not a torch checkpoint")


def _check_names(path: Path, content: bytes) -> None:
    """Refuses a pickle that names anything but what plain state dictionaries are made of.

    Not all that torch allows is harmless: `bytearray` of a large number fills the memory.

    Raises:
        RequestError: it names something else.
        ValueError: it is no pickle.
    """
    for opcode, name, _ in pickletools.genops(content):
        if "GLOBAL" in opcode.name and not _PLAIN.fullmatch(str(name)):
            raise RequestError(f"{path} {other_objects(str(name).replace(' ', '.'))}")


def other_objects(name: str) -> str:
    """What is to be said of a file with a pickle that names something else."""
    return (
        f"holds Python objects other than tensors ({name}), which could run code; "
        "expected a plain state dictionary"
    )


def first_line(error: Exception) -> str:
    """What an error says first, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _record(file: Any, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the record lies, and its size."""
    file.seek(info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile(f"its record {info.filename} is not where it should be")
    return info.header_offset + _LOCAL_HEADER.size + name + extra, info.file_size
