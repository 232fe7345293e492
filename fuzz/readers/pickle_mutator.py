"""Mutates `torch.save` files: the zip around them, and the opcodes of the pickle in it."""

import io
import pickle
import pickletools
import struct
import zipfile
from contextlib import suppress
from random import Random

from fuzz.readers import bytes_mutator as raw

_GLOBALS = (
    *("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch BFloat16Storage"),
    *("torch DoubleStorage", "torch LongStorage", "torch QInt8Storage", "torch HalfStorage"),
    *("collections OrderedDict", "collections Counter", "builtins bytearray", "builtins set"),
    *("torch Size", "torch device", "torch._utils _rebuild_parameter", "torch.nn Parameter"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch Tensor"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_wrapper_subclass"),
    *("_codecs encode", "os system", "builtins eval", "torch.serialization _get_layout"),
    *("torch float32", "torch strided", "torch sparse_coo", "torch per_tensor_affine"),
    *("torch._tensor _rebuild_from_type_v2", "builtins complex", "torch.storage UntypedStorage"),
)
_OPCODES = b"()aNse}]t\x81\x85\x86\x87RbQ0120u.\x88\x89h\x94"
_VALUES = (
    *(pickle.BININT1 + b"\x05", pickle.BININT + b"\xff\xff\xff\xff", pickle.BININT + b"\0\0\0\x40"),
    *(pickle.LONG1 + b"\x08" + b"\xff" * 7 + b"\x7f", pickle.LONG1 + b"\x01\x02", pickle.NEWFALSE),
    *(pickle.BINFLOAT + b"\x7f\xf0" + bytes(6), pickle.BINUNICODE + b"\x03\0\0\0x\ny", b"]", b"}"),
    *(pickle.BINUNICODE + b"\x01\0\0\x001", pickle.LONG4 + b"\0\0\0\x01", b"(t", pickle.NONE),
)

Entries = list[tuple[str, bytes, int]]
"""Name, content and way of compression."""


def entries_of(data: bytes) -> Entries:
    """What a zip file holds; ValueError where it is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            items = archive.infolist()
            if sum(item.file_size for item in items) > 1 << 22:
                raise ValueError("too much of it")
            return [(i.filename, archive.read(i), i.compress_type) for i in items]
    except Exception as error:  # zipfile raises much
        raise ValueError("no zip file") from error


def zip_of(entries: Entries) -> bytes:
    """A zip file of these."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, how in entries:
            info = zipfile.ZipInfo(name[:200] or "x")
            archive.writestr(info, content, how)
    return buffer.getvalue()


def mutate(data: bytes, random: Random) -> bytes:
    """Another file, mostly one with another pickle in it."""
    try:
        entries = entries_of(data)
    except ValueError:
        return raw.flip(data, random)
    choice = random.randrange(14)
    if choice == 0 or not entries:
        return raw.flip(data, random)
    if choice == 1:
        return _flip_directory(data, random)
    at = random.randrange(len(entries))
    if choice == 2:
        raw.shuffle_list(entries, random)
    elif choice == 3:
        name, content, how = entries[at]
        entries[at] = raw.text(name, random).encode(errors="replace").decode(), content, how
    elif choice == 4:
        name, content, _ = entries[at]
        content = random.choice((content, b"\0" * random.choice((0, 1, 1 << 20, 1 << 22))))
        entries[at] = name, content, random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    elif choice == 5:
        entries[at] = entries[at][0], raw.flip(entries[at][1], random), entries[at][2]
    else:
        for index, (name, content, how) in enumerate(entries):
            if name.endswith("data.pkl"):
                entries[index] = name, mutate_pickle(content, random), how
    return zip_of(entries)


def _flip_directory(data: bytes, random: Random) -> bytes:
    """Changes sizes, places and flags in the directory at the end."""
    starts = [at for at in range(len(data) - 46) if data[at : at + 4] == b"PK\x01\x02"]
    if not starts:
        return raw.flip(data, random)
    changed, at = bytearray(data), random.choice(starts)
    field, form = random.choice(
        ((8, "<H"), (10, "<H"), (20, "<I"), (24, "<I"), (28, "<H"), (42, "<I"))
    )
    (value,) = struct.unpack_from(form, changed, at + field)
    mask = (1 << 8 * struct.calcsize(form)) - 1
    struct.pack_into(form, changed, at + field, raw.number(value, random) & mask)
    return bytes(changed)


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """Takes out, doubles, exchanges and inserts opcodes."""
    pieces = _opcodes(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        if not pieces:
            return raw.flip(data, random)
        at = random.randrange(len(pieces))
        match random.randrange(8):
            case 0:
                raw.shuffle_list(pieces, random)
            case 1:
                pieces.insert(at, bytes([random.choice(_OPCODES)]) + b"\0")
            case 2:
                pieces.insert(at, random.choice(_VALUES))
            case 3:
                pieces[at] = _other(pieces[at], random)
            case 4:
                numbers = [i for i, piece in enumerate(pieces) if piece[:1] in b"KMJ\x8a"]
                if numbers:
                    pieces[random.choice(numbers)] = random.choice(_VALUES)
            case 5:
                names = [i for i, piece in enumerate(pieces) if piece[:1] == b"c"]
                if names:
                    pieces[random.choice(names)] = _global(random)
            case 6:
                pieces.insert(at, _global(random) + random.choice(_VALUES) + b"\x85R")
            case _:
                pieces[at:at] = pieces[at : at + random.randrange(1, 30)]
    return b"".join(pieces)


def _global(random: Random) -> bytes:
    module, name = random.choice(_GLOBALS).split()
    return f"c{module}\n{name}\n".encode()


def _other(piece: bytes, random: Random) -> bytes:
    return piece[:1] + raw.flip(piece[1:], random) if len(piece) > 1 else random.choice(_VALUES)


def _opcodes(data: bytes) -> list[bytes]:
    """The pickle cut into its opcodes, as far as it is one."""
    starts = []
    with suppress(Exception):  # it is cut where it is damaged
        starts += [place for _, _, place in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=False)]
