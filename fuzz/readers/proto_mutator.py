"""Mutates protobuf messages by their wire format, without a schema."""

import struct
from dataclasses import dataclass
from random import Random

from fuzz.readers import bytes_mutator as raw

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEPTH = 12


@dataclass
class Field:
    """A field: a number, bytes, or the fields of a message that was opened.

    Only what is changed is opened: models have thousands of messages in one another.
    """

    number: int
    kind: int
    value: "int | bytes | list[Field]"


def parse(data: bytes) -> list[Field]:
    """The fields of a message, unopened; ValueError where it is none."""
    fields, at = [], 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if not number:
            raise ValueError("field 0")
        if kind == _VARINT:
            value, at = _varint(data, at)
            fields.append(Field(number, kind, value))
            continue
        if kind not in (_FIXED32, _FIXED64, _BYTES):
            raise ValueError("a group")
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if size is None:
            size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("it ends too early")
        fields.append(Field(number, kind, data[at : at + size]))
        at += size
    return fields


def _opened(field: Field) -> list[Field] | None:
    """Opens a field that can be a message: a text mostly cannot."""
    if isinstance(field.value, bytes) and field.kind == _BYTES and len(field.value) > 1:
        try:
            field.value = parse(field.value)
        except ValueError:
            return None
    return field.value if isinstance(field.value, list) else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")


def _write_varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def write(fields: list[Field]) -> bytes:
    """The message of these fields, whose lengths are right."""
    out = []
    for field in fields:
        out.append(_write_varint(field.number << 3 | field.kind))
        if isinstance(field.value, int):
            out.append(_write_varint(field.value))
            continue
        content = field.value if isinstance(field.value, bytes) else write(field.value)
        out += [_write_varint(len(content))] * (field.kind == _BYTES) + [content]
    return b"".join(out)


def mutate(data: bytes, random: Random) -> bytes:
    """Another message, mostly one that can be parsed."""
    try:
        fields = parse(data)
    except ValueError:
        return raw.flip(data, random)
    if random.randrange(20) == 0 or not fields:
        return raw.flip(data, random)
    for _ in range(random.choice((1, 1, 2, 4))):
        _change(fields, random)
    return write(fields)


def _change(fields: list[Field], random: Random) -> None:
    """Goes down to a random message, and changes a field there."""
    for _ in range(_DEPTH):
        shuffled = iter(random.sample(fields, len(fields)))
        deeper = next((inner for field in shuffled if (inner := _opened(field))), None)
        if not deeper or random.randrange(4) == 0:
            break
        fields = deeper
    if not fields:
        fields.append(Field(random.randrange(1, 20), _VARINT, 1))
        return
    at = random.randrange(len(fields))
    _opened(fields[at])
    match random.randrange(8):
        case 0 | 1:
            raw.shuffle_list(fields, random)
        case 2:
            fields[at].number = random.choice((1, 2, 3, 4, 5, 7, 8, 13, 14, 100, 502))
        case 3:
            extra = random.choice((Field(1, _VARINT, 1), Field(1, _BYTES, random.randbytes(4))))
            extra.number = random.choice((fields[at].number, random.randrange(1, 30)))
            fields.insert(at, extra)
        case 4 if isinstance(fields[at].value, list):
            nest = fields[at]
            for _ in range(random.choice((1, 30, 200))):
                nest = Field(nest.number, _BYTES, [nest])
            fields[at] = nest
        case _:
            fields[at].value = _other(fields[at], random)


def _other(field: Field, random: Random) -> "int | bytes | list[Field]":
    if isinstance(field.value, int):
        return raw.number(field.value, random)
    if isinstance(field.value, list):
        return random.choice((b"", random.randbytes(5), [], list(field.value) * 2))
    if field.kind != _BYTES:
        size = len(field.value)
        number = struct.pack("<Q", random.choice(raw.NUMBERS))
        return (
            (raw.flip(field.value, random) + b"\0" * 8)[:size]
            if random.randrange(2)
            else number[:size]
        )
    try:
        text = field.value.decode()
    except UnicodeDecodeError:
        return raw.flip(field.value, random)
    if text.isdigit() and random.randrange(2):
        return str(raw.number(int(text[:30]), random)).encode()
    return raw.text(text, random).encode("utf-8", "surrogatepass")
