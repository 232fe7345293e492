"""The suite `memory`: recall of facts after many other tokens.

A batch of episodes reads filler text through all distances. At each distance the questions are
asked; then the state from before the questions is restored and reading continues. So all distances
together cost about as much as the farthest one. Long distances are cut into chained pieces.
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
from rgexport.evaluate.models import EvaluatedModel
from rgexport.evaluate.pieces import Measured, Piece, Result, Settings, chained
from rgexport.evaluate.request import EvaluationRequest
from rgexport.evaluate.suites.episodes import TASKS, Episode, Question, vocabulary_of
from rgexport.runtimes.session import Session

NAME = "memory"
ROWS = 8
"""Episodes of a batch."""
_NEAREST = 16
_FARTHEST_WINDOWS = 4
_SPAN = 1 << 15
"""Most tokens that an episode reads in a piece."""


def farthest(window: int) -> int:
    """Returns the default of the largest distance: four windows."""
    return _FARTHEST_WINDOWS * max(window, _NEAREST)


def distances(last: int) -> list[int]:
    """Returns the tokens between fact and question: 16, 32, 64, … and `last`."""
    values, distance = [], _NEAREST
    while distance < last:
        values.append(distance)
        distance *= 2
    return [*values, last]


def pieces(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Piece]:
    """Yields a chain of pieces for each task and batch of episodes, through all distances."""
    spans = list(_spans(distances(request.farthest or farthest(model.window))))
    for task in TASKS:
        for first in range(0, request.trials, ROWS):
            rows = min(ROWS, request.trials - first)
            batch = {"task": task, "first": first, "rows": rows, "seed": request.seed}
            yield from chained(
                Piece(model.identity, NAME, batch | span, rows * (span["to"] - span["from"]))
                for span in spans
            )


def _spans(asked_at: Sequence[int]) -> Iterator[dict[str, Any]]:
    stops = [*range(_SPAN, asked_at[-1], _SPAN), asked_at[-1]]
    for start, stop in zip([0, *stops], stops, strict=False):
        inside = [distance for distance in asked_at if start < distance <= stop]
        yield {"from": start, "to": stop, "distances": inside}


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    """Returns distance → right answers [rows, questions]; the chance level; a hash of all ids."""
    vocabulary = vocabulary_of(model.tokenizer, session.vocab_size)
    filler = vocabulary.filler
    numbers = range(settings["first"], settings["first"] + settings["rows"])
    task = crc32(settings["task"].encode())
    randoms = [np.random.default_rng([settings["seed"], task, number]) for number in numbers]
    episodes = [TASKS[settings["task"]](vocabulary, random) for random in randoms]
    starts = [int(random.integers(len(filler))) for random in randoms]
    seen, right = settings["from"], {}
    if seen == 0:
        session.reset(len(episodes))
        facts = [[*model.bos, *episode.facts] for episode in episodes]
        session.prefill(np.array(facts, np.int64))
    for stop in sorted({*settings["distances"], settings["to"]}):
        indices = np.array(starts)[:, None] + np.arange(seen, stop)
        session.prefill(filler[indices % len(filler)])
        seen = stop
        if stop in settings["distances"]:
            state = session.get_state()
            right[str(stop)] = _answers(session, episodes).tolist()
            session.set_state(state)
    candidates = [len(question.candidates) for question in episodes[0].questions]
    chance = float(np.mean(1 / np.array(candidates)))
    digest = hashlib.sha256(repr((episodes, starts)).encode() + filler.tobytes())
    return {"right": right, "chance": chance, "ids": digest.hexdigest()}


def _answers(session: Session, episodes: Sequence[Episode]) -> np.ndarray:
    """Asks the questions one after another, each after the right answer; bool [rows, questions]."""
    right = []
    before: list[list[int]] = [[] for _ in episodes]
    for questions in zip(*(episode.questions for episode in episodes), strict=True):
        tokens = [[*answer, *q.prompt] for answer, q in zip(before, questions, strict=True)]
        logits = session.prefill(np.array(tokens, np.int64))[:, -1]
        right.append([_is_right(row, q) for row, q in zip(logits, questions, strict=True)])
        before = [[q.answer] for q in questions]
    return np.array(right).T


def _is_right(logits: np.ndarray, question: Question) -> bool:
    """Whether the answer's logit exceeds every other candidate's logit; a tie is wrong."""
    others = [token for token in question.candidates if token != question.answer]
    return bool(logits[question.answer] > logits[others].max())


def summary(measured: Measured) -> Result:
    """Returns accuracy by task and distance, and where half of it above chance is lost.

    The questions of one episode are not independent: intervals count episodes, each with the share
    of its right answers.
    """
    tasks: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    chances = {}
    for settings, result in measured:
        chances[settings["task"]] = result["chance"]
        for distance, rows in result["right"].items():
            tasks[settings["task"]][int(distance)] += [float(np.mean(row)) for row in rows]
    return {"tasks": [_curve(task, shares, chances[task]) for task, shares in tasks.items()]}


def differences(first: Measured, second: Measured) -> Result:
    """Returns the second model's accuracy minus the first's on the same episodes."""
    gaps: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
    for (settings, before), (_, after) in zip(first, second, strict=True):
        if before["ids"] != after["ids"]:
            continue
        for distance, rows in before["right"].items():
            pairs = zip(rows, after["right"][distance], strict=True)
            gaps[settings["task"], int(distance)] += [(sum(a), sum(b), len(a)) for a, b in pairs]
    return {
        "points": [
            {"task": task, "distance": distance}
            | asdict(mean_difference(*zip(*triples, strict=True)))
            for (task, distance), triples in gaps.items()
        ]
    }


def _curve(task: str, by_distance: Mapping[int, Sequence[float]], chance: float) -> Result:
    points = []
    for distance in sorted(by_distance):
        shares = by_distance[distance]
        points.append({"distance": distance} | asdict(share(sum(shares), len(shares))))
    return {"task": task, "chance": chance, "points": points, "half": _half(points, chance)}


def _half(points: Sequence[Result], chance: float) -> float | None:
    """Returns the distance at which accuracy is halfway between its first value and chance.

    It is interpolated on a logarithmic scale; None if accuracy never falls so far, or is at chance
    from the start.
    """
    top = points[0]["value"]
    if points[0]["low"] <= chance:
        return None
    middle = (top + chance) / 2
    for before, after in itertools.pairwise(points):
        if after["value"] <= middle:
            fraction = (before["value"] - middle) / (before["value"] - after["value"])
            return float(before["distance"] * (after["distance"] / before["distance"]) ** fraction)
    return None
