"""The suite `noise`: how much worse a model continues a text after a corrupted beginning.

The first part of each passage is corrupted, by the passage and the seed alone; the rest is not, so
the same tokens are expected and losses can be compared.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import ne
from typing import NamedTuple
from zlib import crc32

import numpy as np

from rgexport.evaluation import display
from rgexport.evaluation.figures import ends, mean, mean_difference
from rgexport.evaluation.losses import nats
from rgexport.evaluation.models import EvaluatedModel
from rgexport.evaluation.pieces import Chain, EvaluationRequest, Measured, Piece, Result, Settings
from rgexport.evaluation.suites.text import document_of, documents
from rgexport.reporting.chart import Chart
from rgexport.reporting.tables import Row, Table
from rgexport.runtimes.session import Session

NAME, UNIT, INDEPENDENT = "noise", "nats per token after noise", False
CORRUPTED, CLEAN = 600, 300
"""Approximate characters of the two parts of a passage."""
_SHARE = 0.1  # share of the characters or words that most kinds of noise change
_MOST_PASSAGES, _NEAR = 40, 100
_ROWS = "qwertyuiop", "asdfghjkl", "zxcvbnm"
_NEIGHBOUR = {key: right for row in _ROWS for key, right in pairwise(row)}
_MARKERS = "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "[INST]", "</s>"
Random = np.random.Generator


def _typos(text: str, random: Random) -> str:
    """Drops letters, doubles them, or replaces them by the next key."""
    changes: list[Callable[[str], str]]
    changes = [lambda c: "", lambda c: c * 2, lambda c: _NEIGHBOUR.get(c, c)]
    hit = random.random(len(text)) < _SHARE / 2
    chosen = random.integers(0, len(changes), len(text))
    drawn = zip(text, hit, chosen, strict=True)
    return "".join(changes[i](c) if struck and c.isalpha() else c for c, struck, i in drawn)


def _spacing(text: str, random: Random) -> str:
    """Drops spaces, doubles them, or replaces them by line breaks."""
    changes = ("", "  ", "\n")

    def space(_: re.Match[str]) -> str:
        return changes[random.integers(3)] if random.random() < _SHARE else " "

    return re.sub(" ", space, text)


def _by_word(change: Callable[[list[str], Random], list[str]]) -> Callable[[str, Random], str]:
    return lambda text, random: " ".join(change(text.split(" "), random))


def _swap(tokens: list[str], random: Random) -> list[str]:
    index = 0
    while index + 1 < len(tokens):
        if random.random() < _SHARE:
            tokens[index], tokens[index + 1] = tokens[index + 1], tokens[index]
            index += 1
        index += 1
    return tokens


def _insert_markers(tokens: list[str], random: Random) -> list[str]:
    return [
        f"{token} {_MARKERS[random.integers(len(_MARKERS))]}"
        if random.random() < _SHARE / 4
        else token
        for token in tokens
    ]


NOISES: dict[str, Callable[[str, Random], str]] = {
    "none": lambda text, random: text,
    "typos": _typos,
    "upper case": lambda text, random: text.upper(),
    "lower case": lambda text, random: text.lower(),
    "spacing": _spacing,
    "dropped words": _by_word(lambda tokens, r: [t for t in tokens if r.random() >= _SHARE]),
    "swapped words": _by_word(_swap),
    "chat markers": _by_word(_insert_markers),
    # UTF-8 that was read as Latin-1, as in many a web page.
    "other encoding": lambda text, random: text.encode().decode("latin-1"),
}
"""Name → function that corrupts a text. `none` is first: the others are compared with it."""


def chains(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Chain]:
    model.require_tokenizer(NAME)
    for document in documents(request.texts):
        if not (count := len(passages(document.text))):
            continue
        for kind in NOISES:
            settings = {"document": document.name, "sha256": document.sha256, "noise": kind}
            tokens = count * (CORRUPTED + CLEAN) // 4
            yield [Piece(model.identity, NAME, settings | {"seed": request.seed}, tokens)]


def passages(text: str) -> list[tuple[str, str]]:
    """Returns at most `_MOST_PASSAGES`, spread over the text: the part to corrupt, and the rest.

    Both end at a space or a line break, with which the next part begins.
    """
    pairs, start = [], 0
    while (middle := _gap(text, start + CORRUPTED)) and (end := _gap(text, middle + CLEAN)):
        pairs.append((text[start:middle], text[middle:end]))
        start = end
    chosen = np.linspace(0, len(pairs) - 1, min(len(pairs), _MOST_PASSAGES)).astype(int)
    return [pairs[i] for i in chosen.tolist()]


def _gap(text: str, index: int) -> int | None:
    """Returns the index of the next space if one is near, else `index`; None after the end."""
    match = re.compile(r"\s").search(text, index, index + _NEAR)
    return match.start() if match else index if index < len(text) else None


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    document, corrupt = document_of(settings, request), NOISES[settings["noise"]]
    values, tops, hashed = [], [], hashlib.sha256()
    for index, (context, rest) in enumerate(passages(document.text)):
        random = np.random.default_rng([settings["seed"], crc32(settings["noise"].encode()), index])
        ids = model.encode(rest)
        before = [*model.bos, *model.encode(corrupt(context, random))]
        session.reset()
        logits = session.prefill(np.array([before + ids[:-1]]), len(ids))
        values.append(nats(logits, np.array([ids]))[0].tolist())
        tops.append(logits[0].argmax(-1).tolist())
        hashed.update(np.array(ids).tobytes())
    return {"nats": values, "tops": tops, "ids": hashed.hexdigest()}


class _Passage(NamedTuple):
    """Losses [n] and top-1 tokens [n] after the clean and after the corrupted beginning."""

    ids: str
    clean: list[float]
    noisy: list[float]
    clean_tops: list[int]
    tops: list[int]


def _passages_by_noise(measured: Measured) -> dict[str, list[_Passage]]:
    clean = {settings["sha256"]: r for settings, r in measured if settings["noise"] == "none"}
    groups: dict[str, list[_Passage]] = defaultdict(list)
    for settings, result in measured:
        before = clean[settings["sha256"]]
        sides = before["nats"], result["nats"], before["tops"], result["tops"]
        groups[settings["noise"]] += [
            _Passage(result["ids"], *values) for values in zip(*sides, strict=True)
        ]
    return groups


def summary(measured: Measured) -> Result:
    """Returns by kind of noise: the loss, its increase, and the share of top-1 flips."""
    noises = []
    for kind, chosen in _passages_by_noise(measured).items():
        counts = [len(passage.noisy) for passage in chosen]
        before, after = [sum(p.clean) for p in chosen], [sum(p.noisy) for p in chosen]
        flips = [sum(map(ne, passage.clean_tops, passage.tops)) for passage in chosen]
        entry = {
            "noise": kind,
            "nll": mean(after, counts),
            "more": mean_difference(before, after, counts),
            "flips": mean(flips, counts),
            "by_distance": list(_by_distance(chosen)),
        }
        noises.append(entry)
    return {"noises": noises}


def _by_distance(chosen: Sequence[_Passage]) -> Iterator[Result]:
    """Yields the increase of the loss at the first token, the next 2, the next 4, …"""
    longest = max(len(passage.noisy) for passage in chosen)
    for power in range((longest - 1).bit_length() + 1):
        start, stop = (1 << power) - 1, (1 << power + 1) - 1
        sums = [
            (sum(p.clean[start:stop]), sum(p.noisy[start:stop]), len(p.noisy[start:stop]))
            for p in chosen
            if len(p.noisy) > start
        ]
        if sums:
            yield {"token": start + 1, "more": mean_difference(*zip(*sums, strict=True))}


def differences(first: Measured, second: Measured) -> Result:
    """Returns by kind of noise: the second model's increase of the loss minus the first's."""
    entries, others = [], _passages_by_noise(second)
    for kind, chosen in _passages_by_noise(first).items():
        alike = [
            (sum(a.noisy) - sum(a.clean), sum(b.noisy) - sum(b.clean), len(a.noisy))
            for a, b in zip(chosen, others[kind], strict=True)
            if a.ids == b.ids
        ]
        if alike:
            entries.append({"noise": kind} | mean_difference(*zip(*alike, strict=True)))
    return {"noises": entries}


def lost(model: Result) -> list[display.Loss]:
    gaps = display.differences_of(model, NAME, "noises")
    return [display.loss_of(gap["noise"], gap) for gap in gaps if gap["noise"] != "none"]


def tables(models: display.Models) -> Iterator[Table]:
    rows: list[Row] = []
    for entries in display.by_entry(models, NAME, "noises"):
        if entries[0]["noise"] != "none":
            cells = [entries[0]["noise"]]
            for entry in entries:
                cells += [
                    display.difference_cell(entry["more"]),
                    f"{100 * entry['flips']['value']:.1f} %",
                ]
            rows.append(tuple(cells))
    columns = [f"{model['label']}{end}" for model in models for end in (", nats", ", flips")]
    title = "Noise: more nats per token than after a clean text, and other likeliest tokens"
    yield Table(title, ("noise", *columns), rows, columns)


def charts(models: display.Models) -> Iterator[Chart]:
    for entries in display.by_entry(models, NAME, "noises"):
        if entries[0]["noise"] != "none":
            yield display.curves(
                f"After {entries[0]['noise']}",
                "More nats per token than after the clean text, from that token on.",
                ("tokens after the noise", "more nats"),
                models,
                [[(p["token"], ends(p["more"])) for p in e["by_distance"]] for e in entries],
            )
