"""Mutates JSON by its values; an object is a list of pairs, so that a key can stand there twice."""

import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

from fuzz.readers import bytes_mutator as raw


class Pairs(list[tuple[str, Any]]):
    """An object of JSON."""


def parse(text: bytes) -> Any:
    """A value whose objects are `Pairs`; ValueError where it is no JSON."""
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"), object_pairs_hook=Pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write(value: Any) -> bytes:
    """The text of a value, with whatever keys and numbers it has."""
    return "".join(_write(value)).encode("utf-8", "surrogatepass")


def _write(value: Any) -> Iterator[str]:
    if isinstance(value, Pairs):
        yield "{"
        for index, (key, item) in enumerate(value):
            yield ("," if index else "") + json.dumps(key) + ":"
            yield from _write(item)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            yield "," if index else ""
            yield from _write(item)
        yield "]"
    else:
        yield json.dumps(value, ensure_ascii=isinstance(value, str) and len(value) % 2 == 0)


def mutate(text: bytes, random: Random) -> bytes:
    """Another JSON text, mostly a sound one."""
    if random.randrange(12) == 0:
        return _spoil(text, random)
    try:
        value = parse(text)
    except ValueError:
        return raw.flip(text, random)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = change(value, random)
    return write(value)


def change(value: Any, random: Random) -> Any:
    """Changes one value somewhere inside, in place where it can be."""
    places = list(_places(value))
    if not places or random.randrange(40) == 0:
        return _other(value, random)
    holder, index = random.choice(places)
    if isinstance(holder, Pairs):
        key, item = holder[index]
        match random.randrange(8):
            case 0:
                raw.shuffle_list(holder, random)
            case 1:
                holder[index] = raw.text(key, random), item
            case 2:
                holder.insert(random.randrange(len(holder) + 1), (key, _other(item, random)))
            case 3:
                holder[index] = key, random.choice(holder)[1]
            case _:
                holder[index] = key, _other(item, random)
    elif random.randrange(4) == 0:
        raw.shuffle_list(holder, random)
    else:
        holder[index] = _other(holder[index], random)
    return value


def _places(value: Any) -> Iterator[tuple[Any, int]]:
    """Every place that holds a value: (list or `Pairs`, index)."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, list):
            yield from ((holder, index) for index in range(len(holder)))
            waiting += [item for _, item in holder] if isinstance(holder, Pairs) else holder


def _other(value: Any, random: Random) -> Any:
    if random.randrange(3) and isinstance(value, bool | int | float | str):
        return _near(value, random)
    return random.choice(
        (
            *(None, True, False, 0, -1, 1.5, -0.0, math.nan, math.inf, 1e308, 10**400, [], Pairs()),
            *(random.choice(raw.NUMBERS), random.choice(raw.TEXTS), [value], [value, value]),
            *(Pairs([("a", value)]), [0] * 300, Pairs([("content", value), ("content", 1)])),
        )
    )


def _near(value: bool | int | float | str, random: Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return raw.text(value, random)
    if isinstance(value, float):
        return random.choice((-value, value * 2, math.nan, math.inf, -math.inf, 0.0, 1e-45, 1e39))
    as_float = float(value) if abs(value) < 1 << 1000 else math.inf
    return random.choice((raw.number(value, random), as_float, str(value)[:5000], -value))


def _spoil(text: bytes, random: Random) -> bytes:
    """What is wrong with the text itself."""
    match random.randrange(8):
        case 0:
            depth = random.choice((10, 999, 10_000))
            return text.replace(b":", b":" + b"[" * depth + b"]" * depth + b",0:", 1)
        case 1:
            return b"[" * random.choice((500, 30_000))
        case 2:
            return text.decode("utf-8", "replace").encode(
                random.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
            )
        case 3:
            return text + random.choice((b"\0", b" ", b"}", b"{}", text))
        case 4:
            return text.replace(b'"', random.choice((b'"\xff', b'"\xed\xa0\x80', b"'")), 2)
        case 5:
            return text.replace(b"0", b"9" * random.choice((100, 5000)), 1)
        case _:
            return raw.flip(text, random)
