"""The suite `memory`: what a model still knows of something after so many other tokens.

A batch of episodes reads on through all distances: at each of them the questions are asked, and
then the state from before the questions goes on. So the farthest distance costs about as much as
all. A long way is cut into pieces that go on from one another.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from zlib import crc32

import numpy as np

from rgexport.evaluate.figures import mean_difference, share
from rgexport.evaluate.pieces import Piece, Result, chained
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.evaluate.suites.episodes import TASKS, Episode, Question, words_of
from rgexport.runtimes.session import Session

NAME = "memory"
ROWS = 8
"""Episodes of a batch."""
_NEAREST, _STEP = 16, 2
"""The first distance; each of the next is so many times as far."""
_FARTHEST_WINDOWS = 4
_SPAN = 1 << 15
"""Most tokens that an episode reads in a piece."""


def farthest(window: int) -> int:
    """The largest distance that is asked for by default: four windows."""
    return _FARTHEST_WINDOWS * max(window, _NEAREST)


def distances(last: int) -> list[int]:
    """Tokens between what was told and the question: from 16 to the `last`."""
    found, at = [], _NEAREST
    while at < last:
        found.append(at)
        at *= _STEP
    return [*found, last]


def pieces(subject: Subject, request: Request) -> Iterator[Piece]:
    """A chain of pieces for each task and batch of episodes, through all distances."""
    far = distances(request.farthest or farthest(subject.window))
    for task in TASKS:
        for first in range(0, request.trials, ROWS):
            rows = min(ROWS, request.trials - first)
            batch = {"task": task, "first": first, "rows": rows, "seed": request.seed}
            yield from chained(
                [
                    Piece(subject.identity, NAME, batch | way, rows * (way["to"] - way["from"]))
                    for way in _ways(far)
                ]
            )


def _ways(far: Sequence[int]) -> Iterator[dict[str, Any]]:
    stops = [*range(_SPAN, far[-1], _SPAN), far[-1]]
    for start, stop in zip([0, *stops], stops, strict=False):
        asked = [distance for distance in far if start < distance <= stop]
        yield {"from": start, "to": stop, "distances": asked}


def measure(
    subject: Subject, session: Session, work: Mapping[str, Any], request: Request
) -> Result:
    """Which answers are right: distance → [rows, questions]; chance, and a hash of all ids."""
    words = words_of(subject.tokenizer, session.vocab_size)
    numbers = range(work["first"], work["first"] + work["rows"])
    randoms = [_random(work, number) for number in numbers]
    episodes = [TASKS[work["task"]](words, random) for random in randoms]
    starts = [int(random.integers(len(words.filler))) for random in randoms]
    seen, right = work["from"], {}
    if seen == 0:
        session.reset(len(episodes))
        session.prefill(_begun(subject, episodes))
    for stop in sorted({*work["distances"], work["to"]}):
        places = np.array(starts)[:, None] + np.arange(seen, stop)
        session.prefill(words.filler[places % len(words.filler)])
        seen = stop
        if stop in work["distances"]:
            state = session.get_state()
            right[str(stop)] = _asked(session, episodes).tolist()
            session.set_state(state)
    candidates = [len(question.candidates) for question in episodes[0].questions]
    hashed = hashlib.sha256(repr((episodes, starts)).encode() + words.filler.tobytes())
    chance = float(np.mean(1 / np.array(candidates)))
    return {"right": right, "chance": chance, "ids": hashed.hexdigest()}


def _random(work: Mapping[str, Any], number: int) -> np.random.Generator:
    return np.random.default_rng([work["seed"], crc32(work["task"].encode()), number])


def _begun(subject: Subject, episodes: Sequence[Episode]) -> np.ndarray:
    return np.array([[*subject.bos, *episode.told] for episode in episodes], np.int64)


def _asked(session: Session, episodes: Sequence[Episode]) -> np.ndarray:
    """Asks all questions, one after another; bool [rows, questions]."""
    found = []
    given: list[list[int]] = [[] for _ in episodes]
    for questions in zip(*(episode.questions for episode in episodes), strict=True):
        tokens = [[*before, *q.asked] for before, q in zip(given, questions, strict=True)]
        logits = session.prefill(np.array(tokens, np.int64))[:, -1]
        found.append([_is_right(row, q) for row, q in zip(logits, questions, strict=True)])
        given = [[q.answer] for q in questions]
    return np.array(found).T


def _is_right(logits: np.ndarray, question: Question) -> bool:
    """Whether the right candidate is above all others: ties are wrong."""
    others = [token for token in question.candidates if token != question.answer]
    return bool(logits[question.answer] > logits[others].max())


def summary(found: Sequence[tuple[Mapping[str, Any], Result]]) -> Result:
    """Accuracy by task and distance, and where half of what is above chance is left.

    The questions of one episode are not independent: an interval counts episodes, each of them as
    right as the share of its answers.
    """
    tasks: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    chances = {}
    for work, result in found:
        chances[work["task"]] = result["chance"]
        for distance, rows in result["right"].items():
            tasks[work["task"]][int(distance)] += [float(np.mean(row)) for row in rows]
    return {"tasks": [_of_task(task, far, chances[task]) for task, far in tasks.items()]}


def differences(
    first: Sequence[tuple[Mapping[str, Any], Result]],
    second: Sequence[tuple[Mapping[str, Any], Result]],
) -> Result:
    """What a second model's accuracy is above the first's on the same episodes."""
    gaps: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
    for (work, one), (_, other) in zip(first, second, strict=True):
        if one["ids"] != other["ids"]:
            continue
        for distance, rows in one["right"].items():
            pairs = zip(rows, other["right"][distance], strict=True)
            gaps[work["task"], int(distance)] += [(sum(a), sum(b), len(a)) for a, b in pairs]
    return {
        "points": [
            {"task": task, "distance": distance} | asdict(mean_difference(*zip(*each, strict=True)))
            for (task, distance), each in gaps.items()
        ]
    }


def _of_task(task: str, by_distance: Mapping[int, Sequence[float]], chance: float) -> Result:
    points = []
    for distance in sorted(by_distance):
        each = by_distance[distance]
        estimate = share(sum(each), len(each))
        points.append({"distance": distance} | asdict(estimate))
    return {"task": task, "chance": chance, "points": points, "half": _half(points, chance)}


def _half(points: Sequence[Result], chance: float) -> float | None:
    """Where accuracy is halfway between its first value and chance.

    Between two distances by logarithm; None where it never falls, or is at chance from the start.
    """
    top = points[0]["value"]
    if points[0]["low"] <= chance:
        return None
    middle = (top + chance) / 2
    for before, after in itertools.pairwise(points):
        if after["value"] <= middle:
            part = (before["value"] - middle) / (before["value"] - after["value"])
            return float(before["distance"] * (after["distance"] / before["distance"]) ** part)
    return None
