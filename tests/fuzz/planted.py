"""Readers with a fault each, which the fuzzer must find."""

import time
from pathlib import Path
from random import Random
from typing import Any

from fuzz.readers import weights
from fuzz.readers.target import Target
from rgexport.griffin import safetensors_file

SOUND = weights.TARGETS["safetensors"]


def _read(data: bytes, folder: Path) -> Any:
    """Believes what a header says of where its tensors lie."""
    check, safetensors_file._check_extents = safetensors_file._check_extents, lambda *_: None
    try:
        return SOUND.read(data, folder)
    finally:
        safetensors_file._check_extents = check


def _mutate_word(data: bytes, random: Random) -> bytes:
    return bytes(random.choice((*data, random.randrange(256))) for _ in range(3))


def _on_word(act: Any) -> Target:
    """Does something when the input begins with one of two bytes."""

    def read(data: bytes, folder: Path) -> None:
        if data[:1] in b"\x07\x08" and data:
            act()

    def agree(data: bytes, folder: Path, answer: None) -> None:
        pass

    return Target("planted", lambda folder: [b"abc"], _mutate_word, read, agree)


def _hang() -> None:
    time.sleep(60)


def _swell() -> None:
    bytearray(b"x") * (100 << 20)


def _crash() -> None:
    raise KeyError("dtype")


TARGETS = {
    "believes": Target("believes", SOUND.seeds, SOUND.mutate, _read, SOUND.agree),
    "hangs": _on_word(_hang),
    "swells": _on_word(_swell),
    "crashes": _on_word(_crash),
}
