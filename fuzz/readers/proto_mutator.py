"""Mutates protobuf messages by their wire format, without a schema."""

import struct
from dataclasses import dataclass
from random import Random

from fuzz.readers import bytes_mutator as raw

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEPTH = 12


@dataclass
class Field:
    """A field: a number, bytes, or the fields of a message."""

    number: int
    kind: int
    value: "int | bytes | list[Field]"


def parse(data: bytes, depth: int = 0) -> list[Field]:
    """The fields of a message; ValueError where it is none."""
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
        content = data[at : at + size]
        at += size
        fields.append(Field(number, kind, _inner(content, depth) if kind == _BYTES else content))
    return fields


def _inner(content: bytes, depth: int) -> "bytes | list[Field]":
    """A message, where it can be one: a text mostly cannot."""
    if depth < _DEPTH and 1 < len(content):
        try:
            return parse(content, depth + 1)
        except ValueError:
            pass
    return content


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
    while True:
        deeper = [field for field in fields if isinstance(field.value, list) and field.value]
        if not deeper or random.randrange(4) == 0:
            break
        fields = random.choice(deeper).value  # type: ignore[assignment]
    if not fields:
        fields.append(Field(random.randrange(1, 20), _VARINT, 1))
        return
    at = random.randrange(len(fields))
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
