"""What every mutator can do to bytes, and to the names and numbers that formats are made of."""

import struct
from collections.abc import Callable
from random import Random
from typing import TypeVar

T = TypeVar("T")

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 31, 64, 255, 256, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31)
NUMBERS += ((1 << 32) - 1, 1 << 32, 1 << 40, (1 << 53) + 1, (1 << 61) + 1, (1 << 62) + 1)
NUMBERS += ((1 << 63) - 1, 1 << 63, (1 << 64) - 1)
TEXTS = (
    *("", " ", "a", "default", "../../etc/passwd", "/etc/passwd", "~", "con:", "a\\b", "x" * 5000),
    *("a\nb", "a\rb", "\x1b[31mred\x1b[2J", "\x1b]0;title\x07", "\u202eevil", "\u2028", "\0", "é"),
    *("nul\0byte", "🎒", "\ud800", "{{ 7 * 7 }}", "%s%n", "<eos>", "NaN", "1e999", "-0"),
)


def flip(data: bytes, random: Random) -> bytes:
    """Changes, adds or takes out some bytes."""
    if not data:
        return bytes([random.randrange(256)])
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(changed) or 1)
        random.choice(_STEPS)(changed, at, random)
    return bytes(changed)


def _bit(data: bytearray, at: int, random: Random) -> None:
    if data:
        data[at] ^= 1 << random.randrange(8)


def _byte(data: bytearray, at: int, random: Random) -> None:
    if data:
        data[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))


def _number(data: bytearray, at: int, random: Random) -> None:
    form, mask = random.choice((("<H", 0xFFFF), ("<I", 0xFFFFFFFF), ("<Q", (1 << 64) - 1)))
    value = struct.pack(form, random.choice(NUMBERS) & mask)
    data[at : at + len(value)] = value


def _cut(data: bytearray, at: int, random: Random) -> None:
    del data[at : at + random.choice((1, 2, 8, 64, len(data)))]


def _repeat(data: bytearray, at: int, random: Random) -> None:
    piece = data[at : at + random.choice((1, 4, 16, 64))]
    data[at:at] = piece * random.choice((1, 2, 16))


def _insert(data: bytearray, at: int, random: Random) -> None:
    data[at:at] = random.choice(TEXTS).encode("utf-8", "surrogatepass")


_STEPS: tuple[Callable[[bytearray, int, Random], None], ...] = (
    *(_bit, _byte, _byte, _number, _number, _cut, _repeat, _insert),
)


def number(value: int, random: Random) -> int:
    """Another number: near, far, or one of those at which things break."""
    choice = random.randrange(4)
    if choice == 0:
        return value + random.choice((-1, 1, -8, 8, 64))
    if choice == 1:
        return random.choice((value * 2, value // 2, -value, value ^ (1 << random.randrange(64))))
    return random.choice(NUMBERS)


def text(value: str, random: Random) -> str:
    """Another text."""
    choice = random.randrange(4)
    if choice == 0 and value:
        at = random.randrange(len(value))
        return value[:at] + random.choice(TEXTS) + value[at + random.randrange(2) :]
    if choice == 1 and value:
        at = random.randrange(len(value))
        return value[:at] + chr(random.choice((0, 10, 27, 127, 0x85, 0x2E, 0x2F))) + value[at:]
    return random.choice(TEXTS)


def shuffle_list(items: list[T], random: Random) -> None:
    """Takes out, doubles or exchanges items of a list in place."""
    if not items:
        return
    i, j = random.randrange(len(items)), random.randrange(len(items))
    match random.randrange(3):
        case 0:
            del items[i]
        case 1:
            items.insert(j, items[i])
        case _:
            items[i], items[j] = items[j], items[i]
