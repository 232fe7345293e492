"""The suite `memory`: recall of facts after many other tokens.

A batch of episodes reads filler text through all distances. At each distance the questions are
asked; then the state from before the questions is restored and reading continues. So all distances
together cost about as much as the farthest one. Long distances are cut into chained pieces.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np

from rgexport.evaluation import display
from rgexport.evaluation.figures import ends, mean_difference, share
from rgexport.evaluation.models import EvaluatedModel
from rgexport.evaluation.pieces import Chain, EvaluationRequest, Measured, Piece, Result, Settings
from rgexport.evaluation.suites.episodes import TASKS, Episode, vocabulary_of
from rgexport.reporting.chart import Chart, share_axis, y_values
from rgexport.reporting.numbers import percent
from rgexport.reporting.tables import Row, Table
from rgexport.runtimes.session import Session

NAME, UNIT, INDEPENDENT = "memory", "of 100 answers", True
ROWS = 8
"""Episodes of a batch."""
_NEAREST = 16
"""The smallest distance between fact and question, in tokens; each further one is twice as far."""
_SPAN = 1 << 15  # most tokens that an episode reads in a piece
_COLUMNS = 10  # most distances in a table: ten fit a terminal


def doublings(first: int, last: int) -> list[int]:
    """Returns `first`, twice that, and so on, and `last`."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, last]


def chains(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Chain]:
    assert request.farthest is not None
    spans = list(_spans(doublings(_NEAREST, request.farthest)))
    for task in TASKS:
        for first in range(0, request.trials, ROWS):
            rows = min(ROWS, request.trials - first)
            batch = {"task": task, "first": first, "rows": rows, "seed": request.seed}
            yield [
                Piece(model.identity, NAME, batch | span, rows * (span["to"] - span["from"]))
                for span in spans
            ]


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
        # A tie is wrong.
        right.append(
            [
                all(row[q.answer] > row[token] for token in q.candidates if token != q.answer)
                for row, q in zip(logits, questions, strict=True)
            ]
        )
        before = [[q.answer] for q in questions]
    return np.array(right).T


def summary(measured: Measured) -> Result:
    """Returns accuracy by task and distance, and where half of it above chance is lost.

    Intervals count episodes, each with its share of right answers, which are not independent.
    """
    tasks: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    chances = {}
    for settings, result in measured:
        chances[settings["task"]] = result["chance"]
        for distance, rows in result["right"].items():
            tasks[settings["task"]][int(distance)] += [float(np.mean(row)) for row in rows]
    entries = []
    for task, by_distance in tasks.items():
        points = [
            {"distance": distance} | share(sum(shares), len(shares))
            for distance, shares in sorted(by_distance.items())
        ]
        half = _half(points, chances[task])
        entries.append({"task": task, "chance": chances[task], "points": points, "half": half})
    return {"tasks": entries}


def _half(points: Sequence[Result], chance: float) -> float | None:
    """Returns the distance at which accuracy is halfway between its first value and chance.

    It is interpolated logarithmically; None if it is never reached, or at chance from the start.
    """
    if points[0]["low"] <= chance:
        return None
    middle = (points[0]["value"] + chance) / 2
    for before, after in itertools.pairwise(points):
        if after["value"] <= middle:
            fraction = (before["value"] - middle) / (before["value"] - after["value"])
            return float(before["distance"] * (after["distance"] / before["distance"]) ** fraction)
    return None


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
            {"task": task, "distance": distance} | mean_difference(*zip(*triples, strict=True))
            for (task, distance), triples in gaps.items()
        ]
    }


def lost(model: Result) -> list[display.Loss]:
    """Returns the mean over all distances, at which the same episodes are asked, of each task."""
    counts = {c["task"]: c["points"][0]["count"] for c in model["suites"][NAME]["tasks"]}
    gaps = defaultdict(list)
    for gap in display.differences_of(model, NAME, "points"):
        gaps[gap["task"]].append(display.loss_of(gap["task"], gap))
    losses = []
    for task, of_task in gaps.items():
        margin = None
        if all(loss.margin is not None for loss in of_task):
            # Episodes that all end alike still leave room for one in 3 / n that does not.
            margin = float(np.mean([loss.margin for loss in of_task])) or 3 / counts[task]
        value = -float(np.mean([loss.value for loss in of_task]))
        losses.append(display.Loss(task, 100 * value, margin and 100 * margin))
    return losses


def tables(models: display.Models) -> Iterator[Table]:
    for entries in display.by_entry(models, NAME, "tasks"):
        first, count = entries[0], len(entries[0]["points"])
        # Every other distance has a column, if they are many.
        columns = range(count) if count <= _COLUMNS else range((count - 1) % 2, count, 2)
        rows: list[Row] = []
        for model, curve in zip(models, entries, strict=True):
            differing = {
                point["distance"]
                for point in display.differences_of(model, NAME, "points")
                if point["task"] == curve["task"] and display.is_significant(point["p"])
            }
            points = [curve["points"][column] for column in columns]
            cells = [f"{p['value']:.2f}{'*' * (p['distance'] in differing)}" for p in points]
            rows.append((model["label"], *cells, _half_cell(curve)))
        title = (
            f"Memory, {first['task']}: right answers after so many tokens; "
            f"{first['chance']:.2f} by chance; * differs from {models[0]['label']} (p < 0.05)"
        )
        header = ("model", *(f"{first['points'][i]['distance']:,}" for i in columns), "half at")
        yield Table(title, header, rows, header[1:])


def _half_cell(curve: Result) -> str:
    if curve["half"] is not None:
        return f"{curve['half']:,.0f}"
    return "at chance" if curve["points"][0]["low"] <= curve["chance"] else "beyond"


def charts(models: display.Models) -> Iterator[Chart]:
    for entries in display.by_entry(models, NAME, "tasks"):
        points = [[(p["distance"], ends(p)) for p in curve["points"]] for curve in entries]
        task, chance = entries[0]["task"], entries[0]["chance"]
        summary = f"Share of right answers by the tokens in between; {percent(chance)} by chance."
        chart = display.curves(
            task, summary, ("tokens in between", "right answers"), models, points
        )
        axis = share_axis(y_values(chart.series))
        yield replace(chart, y=axis, show_y=percent, level=("chance", chance))
