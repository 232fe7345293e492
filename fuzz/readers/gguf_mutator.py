"""Takes a GGUF file apart, changes keys, values and tensors, and puts it together again."""

import struct
from dataclasses import dataclass
from random import Random

from fuzz.readers import bytes_mutator as raw

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class Parts:
    """`values`: (key, type, bytes of the value); `tensors`: (name, dimensions, type, offset)."""

    version: int
    values: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, list[int], int, int]]
    data: bytes


def take_apart(data: bytes) -> Parts:
    """The parts of a file that is sound at least as far as this goes; ValueError if not."""
    try:
        return _Parser(data).parts()
    except (struct.error, IndexError, KeyError):
        raise ValueError("no GGUF file") from None


class _Parser:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise IndexError
        self.at += count
        return self.data[self.at - count : self.at]

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def parts(self) -> Parts:
        if self.take(4) != b"GGUF":
            raise IndexError
        version, tensors, values = self.number("<I"), self.number("<Q"), self.number("<Q")
        if tensors + values > len(self.data):
            raise IndexError
        read = [self._value() for _ in range(values)]
        infos = [self._tensor() for _ in range(tensors)]
        start = -(-self.at // ALIGNMENT) * ALIGNMENT
        return Parts(version, read, infos, self.data[start:])

    def _value(self) -> tuple[bytes, int, bytes]:
        key, kind, start = self.string(), self.number("<I"), self.at
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item == _STRING:
                for _ in range(count):
                    self.string()
            else:
                self.take(count * _SIZES[item])
        else:
            self.take(_SIZES[kind])
        return key, kind, self.data[start : self.at]

    def _tensor(self) -> tuple[bytes, list[int], int, int]:
        name, count = self.string(), self.number("<I")
        return name, [self.number("<Q") for _ in range(count)], self.number("<I"), self.number("<Q")


def put_together(parts: Parts, counts: tuple[int, int] | None = None) -> bytes:
    """The file; `counts` may state other numbers of tensors and values than there are."""
    tensors, values = counts or (len(parts.tensors), len(parts.values))
    out = [b"GGUF", struct.pack("<IQQ", parts.version & 0xFFFFFFFF, tensors, values)]
    for key, kind, value in parts.values:
        out += struct.pack("<Q", len(key)), key, struct.pack("<I", kind & 0xFFFFFFFF), value
    for name, shape, kind, offset in parts.tensors:
        out += struct.pack("<Q", len(name)), name, struct.pack("<I", len(shape))
        out += [struct.pack("<Q", size & _U64) for size in shape]
        out.append(struct.pack("<IQ", kind & 0xFFFFFFFF, offset & _U64))
    head = b"".join(out)
    return head + b"\0" * (-len(head) % ALIGNMENT) + parts.data


_U64 = (1 << 64) - 1


def mutate(data: bytes, random: Random) -> bytes:
    """Another file, mostly of sound form."""
    try:
        parts = take_apart(data)
    except ValueError:
        return raw.flip(data, random)
    counts = None
    for _ in range(random.choice((1, 1, 2))):
        choice = random.randrange(12)
        if choice == 0:
            return raw.flip(data, random)
        if choice == 1:
            counts = random.choice(raw.NUMBERS), len(parts.values)
        elif choice == 2:
            parts.data = raw.flip(parts.data, random)
        elif choice == 3:
            raw.shuffle_list(random.choice((parts.values, parts.tensors)), random)
        elif choice < 8 and parts.tensors:
            _change_tensor(parts, random)
        elif parts.values:
            _change_value(parts, random)
    return put_together(parts, counts)


def _change_tensor(parts: Parts, random: Random) -> None:
    at = random.randrange(len(parts.tensors))
    name, shape, kind, offset = parts.tensors[at]
    shape = list(shape)
    match random.randrange(5):
        case 0:
            name = raw.text(name.decode(errors="replace"), random).encode("utf-8", "surrogatepass")
        case 1:
            kind = random.choice((0, 1, 2, 3, 8, 10, 14, 30, 31, 99, 0xFFFFFFFF))
        case 2:
            offset = raw.number(offset, random)
        case 3 if shape:
            axis = random.randrange(len(shape))
            shape[axis] = raw.number(shape[axis], random)
        case _:
            raw.shuffle_list(shape, random)
            shape = shape or [1] * random.randrange(9)
    parts.tensors[at] = name, shape, kind, offset


def _change_value(parts: Parts, random: Random) -> None:
    at = random.randrange(len(parts.values))
    key, kind, value = parts.values[at]
    choice = random.randrange(5)
    if choice == 0:
        key = raw.text(key.decode(errors="replace"), random).encode("utf-8", "surrogatepass")
    elif choice == 1:
        kind, value = other_value(random)
    elif kind == _STRING:
        text = raw.text(value[8:].decode(errors="replace"), random).encode("utf-8", "surrogatepass")
        value = struct.pack("<Q", len(text)) + text
    elif kind == _ARRAY:
        value = raw.flip(value, random) if choice == 2 else _other_array(random)
    else:
        value = (raw.flip(value, random) + b"\0" * 8)[: _SIZES[kind]]
    parts.values[at] = key, kind, value


def other_value(random: Random) -> tuple[int, bytes]:
    """A value of any type."""
    kind = random.choice((*_SIZES, _STRING, _ARRAY, _ARRAY))
    if kind == _ARRAY:
        return kind, _other_array(random)
    if kind == _STRING:
        text = random.choice(raw.TEXTS).encode("utf-8", "surrogatepass")
        return kind, struct.pack("<Q", len(text)) + text
    return kind, random.randbytes(_SIZES[kind])


def _other_array(random: Random) -> bytes:
    item, count = random.choice((*_SIZES, _STRING, _ARRAY)), random.choice((0, 1, 2, 40))
    stated = random.choice((count, count, random.choice(raw.NUMBERS)))
    each = struct.pack("<Q", 1) + b"a" if item == _STRING else random.randbytes(_SIZES.get(item, 1))
    return struct.pack("<IQ", item, stated) + each * count
