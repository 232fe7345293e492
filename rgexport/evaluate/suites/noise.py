"""The suite `noise`: how much worse a model continues a text that was written badly.

A text is cut into passages. The first part of a passage is spoilt, the rest is as it was: the same
tokens are expected, so losses compare. What is spoilt depends on the passage and the seed alone.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np

from rgexport.evaluate.figures import mean, mean_difference
from rgexport.evaluate.losses import nats
from rgexport.evaluate.pieces import Piece, Result
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.evaluate.suites.text import documents, the_document
from rgexport.runtimes.session import Session

NAME = "noise"
SPOILT, KEPT = 600, 300
"""Characters of a passage that are spoilt, about, and that follow them."""
_SHARE = 0.1
"""Of the characters or words that a kind of noise changes."""
_MOST_PASSAGES, _NEAR = 40, 100
_ROWS = "qwertyuiop", "asdfghjkl", "zxcvbnm"
_BESIDE = {key: right for row in _ROWS for key, right in pairwise(row)}
_MARKERS = "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "[INST]", "</s>"
Random = np.random.Generator


def _typos(text: str, random: Random) -> str:
    """Left out, doubled, or the key beside it."""
    ways: list[Callable[[str], str]]
    ways = [lambda c: "", lambda c: c * 2, lambda c: _BESIDE.get(c, c)]
    hit = random.random(len(text)) < _SHARE / 2
    chosen = random.integers(0, len(ways), len(text))
    drawn = zip(text, hit, chosen, strict=True)
    return "".join(ways[way](c) if struck and c.isalpha() else c for c, struck, way in drawn)


def _spacing(text: str, random: Random) -> str:
    """Spaces that are gone, doubled, or line breaks."""
    ways = ("", "  ", "\n")

    def space(_: re.Match[str]) -> str:
        return ways[random.integers(3)] if random.random() < _SHARE else " "

    return re.sub(" ", space, text)


def _words(change: Callable[[list[str], Random], list[str]]) -> Callable[[str, Random], str]:
    return lambda text, random: " ".join(change(text.split(" "), random))


def _dropped(words: list[str], random: Random) -> list[str]:
    return [word for word in words if random.random() >= _SHARE]


def _swapped(words: list[str], random: Random) -> list[str]:
    at = 0
    words = words.copy()
    while at + 1 < len(words):
        if random.random() < _SHARE:
            words[at], words[at + 1] = words[at + 1], words[at]
            at += 1
        at += 1
    return words


def _markers(words: list[str], random: Random) -> list[str]:
    """The markers of chats, as text, between some words."""

    def marked(word: str) -> str:
        return f"{word} {_MARKERS[random.integers(len(_MARKERS))]}"

    return [marked(word) if random.random() < _SHARE / 4 else word for word in words]


NOISES: dict[str, Callable[[str, Random], str]] = {
    "none": lambda text, random: text,
    "typos": _typos,
    "upper case": lambda text, random: text.upper(),
    "lower case": lambda text, random: text.lower(),
    "spacing": _spacing,
    "dropped words": _words(_dropped),
    "swapped words": _words(_swapped),
    "chat markers": _words(_markers),
    # UTF-8 that was read as Latin-1, as in many a web page.
    "other encoding": lambda text, random: text.encode().decode("latin-1"),
}
"""Name → what spoils a text. `none` comes first: the others are compared with it."""


def pieces(subject: Subject, request: Request) -> Iterator[Piece]:
    """A piece for each document and kind of noise."""
    subject.require_tokenizer(NAME)
    for document in documents(request.texts):
        if not (count := len(passages(document.text))):
            continue
        for kind in NOISES:
            work = {"document": document.name, "sha256": document.sha256, "noise": kind}
            tokens = count * (SPOILT + KEPT) // 4
            yield Piece(subject.identity, NAME, work | {"seed": request.seed}, tokens)


def passages(text: str) -> list[tuple[str, str]]:
    """What is spoilt, and what follows it: at most `_MOST_PASSAGES`, spread over the text.

    Both begin and end at a space or a line break, which the second part has in front.
    """
    found, start = [], 0
    while (middle := _gap(text, start + SPOILT)) and (end := _gap(text, middle + KEPT)):
        found.append((text[start:middle], text[middle:end]))
        start = end
    chosen = np.linspace(0, len(found) - 1, min(len(found), _MOST_PASSAGES)).astype(int)
    return [found[i] for i in chosen.tolist()]


def _gap(text: str, at: int) -> int | None:
    """The next space, where one is near; None behind the end."""
    match = re.compile(r"\s").search(text, at, at + _NEAR)
    return match.start() if match else at if at < len(text) else None


def measure(
    subject: Subject, session: Session, work: Mapping[str, Any], request: Request
) -> Result:
    """Of each passage: the losses of what follows, and the likeliest token at each place of it."""
    document = the_document(work, request)
    spoil = NOISES[work["noise"]]
    each, tops, hashed = [], [], hashlib.sha256()
    for index, (context, rest) in enumerate(passages(document.text)):
        random = np.random.default_rng([work["seed"], crc32(work["noise"].encode()), index])
        ids = subject.encode(rest)
        before = [*subject.bos, *subject.encode(spoil(context, random))]
        session.reset()
        logits = session.prefill(np.array([before + ids[:-1]]), len(ids))
        each.append(nats(logits, np.array([ids]))[0].tolist())
        tops.append(logits[0].argmax(-1).tolist())
        hashed.update(np.array(ids).tobytes())
    return {"nats": each, "tops": tops, "ids": hashed.hexdigest()}


def summary(found: Sequence[tuple[Mapping[str, Any], Result]]) -> Result:
    """By kind of noise: the loss, what it is above the clean text's, and the share of flips."""
    clean = {work["sha256"]: result for work, result in found if work["noise"] == "none"}
    groups = defaultdict(list)
    for work, result in found:
        groups[work["noise"]].append((clean[work["sha256"]], result))
    return {"noises": [_of_noise(kind, pairs) for kind, pairs in groups.items()]}


def _of_noise(kind: str, pairs: Sequence[tuple[Result, Result]]) -> Result:
    each = [nats for _, result in pairs for nats in result["nats"]]
    after, counts = list(map(sum, each)), list(map(len, each))
    before = [sum(nats) for clean, _ in pairs for nats in clean["nats"]]
    flips = [
        sum(a != b for a, b in zip(first, second, strict=True))
        for one, other in pairs
        for first, second in zip(one["tops"], other["tops"], strict=True)
    ]
    return {
        "noise": kind,
        "nll": asdict(mean(after, counts)),
        "more": asdict(mean_difference(before, after, counts)),
        "flips": asdict(mean(flips, counts)),
        "by_distance": list(_by_distance(pairs)),
    }


def _by_distance(pairs: Sequence[tuple[Result, Result]]) -> Iterator[Result]:
    """What the loss is above that of the clean text from the first token, the second, the fourth…

    An entry goes up to the next one.
    """
    longest = max(len(nats) for _, result in pairs for nats in result["nats"])
    for power in range((longest - 1).bit_length() + 1):
        start, stop = (1 << power) - 1, (1 << power + 1) - 1
        parts = [
            (sum(clean[start:stop]), sum(spoilt[start:stop]), len(clean[start:stop]))
            for one, other in pairs
            for clean, spoilt in zip(one["nats"], other["nats"], strict=True)
            if len(clean) > start
        ]
        if parts:
            gap = mean_difference(*zip(*parts, strict=True))
            yield {"token": start + 1, "more": asdict(gap)}


def differences(
    first: Sequence[tuple[Mapping[str, Any], Result]],
    second: Sequence[tuple[Mapping[str, Any], Result]],
) -> Result:
    """By kind of noise, how much more a second model's loss grows by it than the first's."""
    sides = [{(w["sha256"], w["noise"]): r for w, r in side} for side in (first, second)]
    gaps: dict[str, list[list[float]]] = defaultdict(lambda: [[], [], []])
    for (sha256, kind), one in sides[0].items():
        other = sides[1][sha256, kind]
        if one["ids"] != other["ids"]:
            continue
        for kept, result, side in zip(gaps[kind], (one, other), sides, strict=False):
            clean = side[sha256, "none"]["nats"]
            kept += [sum(a) - sum(b) for a, b in zip(result["nats"], clean, strict=True)]
        gaps[kind][2] += map(len, one["nats"])
    return {
        "noises": [
            {"noise": kind} | asdict(mean_difference(*columns)) for kind, columns in gaps.items()
        ]
    }
