"""The suite `tasks`: EleutherAI's lm_eval, which makes the requests and scores the answers.

A piece is some of the requests of a task, and its result are the answers. So a changed metric needs
no new measurement, and a changed document only those of the new requests.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rgexport.errors import RequestError
from rgexport.evaluate.figures import Estimate, mean, mean_difference, share
from rgexport.evaluate.harness.answers import LmRequest, answer, sha256_of
from rgexport.evaluate.harness.tasks import Score, Tasks, load_tasks
from rgexport.evaluate.models import EvaluatedModel
from rgexport.evaluate.pieces import Measured, Piece, Result, Settings
from rgexport.evaluate.request import EvaluationRequest
from rgexport.runtimes.session import Session

NAME = "tasks"
REQUESTS = 256
"""Requests of a piece."""
_TOKEN = 4
"""Approximate characters of a token."""


def _identity(value: float) -> float:
    return value


_SUMS: dict[str, tuple[Callable[[Any], tuple[float, float]], Callable[[float], float]]] = {
    "mean": (lambda value: (float(value), 1.0), _identity),
    "perplexity": (lambda log: (-log, 1.0), math.exp),
    "weighted_perplexity": (lambda pair: (-pair[0], pair[1]), math.exp),
    "bits_per_byte": (lambda pair: (-pair[0] / math.log(2), pair[1]), _identity),
}
"""lm_eval's aggregations that are functions of a mean: example → sum and weight; mean → figure.

A pair is a log-likelihood and its number of words or bytes."""


def pieces(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Piece]:
    """Yields a piece for each `REQUESTS` requests of a task."""
    model.require_tokenizer(NAME)
    for task, requests in _tasks(request).requests.items():
        for first in range(0, len(requests), REQUESTS):
            part = requests[first : first + REQUESTS]
            settings = {"task": task, "first": first, "requests": len(part)}
            tokens = sum(len(instance.arguments) for instance in part) // _TOKEN
            yield Piece(model.identity, NAME, settings | {"sha256": sha256_of(part)}, tokens)


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    """Returns the answers to some requests of a task, and the tokens that were read for them."""
    assert model.tokenizer is not None
    part = _requests_of(_tasks(request), settings)
    if sha256_of(part) != settings["sha256"]:
        raise RequestError(
            f"the task {settings['task']} has changed while it was measured; try again"
        )
    return answer(model.tokenizer, session, part)


def _tasks(request: EvaluationRequest) -> Tasks:
    return load_tasks(request.tasks, request.task_files, request.examples, request.seed)


def _requests_of(tasks: Tasks, settings: Settings) -> list[LmRequest]:
    first = settings["first"]
    return tasks.requests[settings["task"]][first : first + settings["requests"]]


def scored(measured: Measured, request: EvaluationRequest) -> list[tuple[Settings, Result]]:
    """Returns lm_eval's figures of each task and group, from the answers."""
    tasks, answers = _tasks(request), dict[LmRequest, Any]()
    tokens: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for settings, result in measured:
        answers |= zip(_requests_of(tasks, settings), result["answers"], strict=True)
        for index, key in enumerate(("read", "asked")):
            tokens[settings["task"]][index] += result[key]
    figures = defaultdict(list)
    for score in tasks.scores(answers):
        figures[score.task].append(_figure(score))
    return [
        (
            {"task": name},
            {"shots": tasks.shots.get(name), "tokens": tokens.get(name), "metrics": metrics},
        )
        for name, metrics in figures.items()
    ]


def _figure(score: Score) -> Result:
    """Returns a figure with the sums and weights of its examples, None if it is no mean of them."""
    figure = {
        "metric": score.metric,
        "value": score.value,
        "higher_is_better": score.higher_is_better,
        "aggregation": score.aggregation,
        "sums": None,
        "counts": None,
    }
    if score.value is None or not score.values or score.aggregation not in _SUMS:
        return figure
    split, from_mean = _SUMS[score.aggregation]
    try:
        sums, counts = zip(*map(split, score.values), strict=True)
        same = math.isclose(from_mean(sum(sums) / sum(counts)), score.value, rel_tol=1e-6)
    except (TypeError, ValueError, ArithmeticError):
        return figure
    return figure | {"sums": sums, "counts": counts} if same else figure


def summary(measured: Measured) -> Result:
    """Returns the figures of each task or group with their intervals, and the tokens read."""
    return {
        "tasks": [
            {
                "task": settings["task"],
                "shots": result["shots"],
                "tokens": result["tokens"],
                "metrics": [_with_interval(figure) for figure in result["metrics"]],
            }
            for settings, result in measured
        ]
    }


def _with_interval(figure: Result) -> Result:
    """Returns a figure with its interval and its number of examples."""
    entry = {key: figure[key] for key in ("metric", "value", "higher_is_better")}
    if figure["sums"] is None:
        return entry | {"low": None, "high": None, "count": None}
    estimate = _estimate(figure["sums"], figure["counts"])
    low, high = (_from_mean(figure, end) for end in (estimate.low, estimate.high))
    return entry | {"low": low, "high": high, "count": len(figure["sums"])}


def _estimate(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    if {*counts} == {1.0} and {*sums} <= {0.0, 1.0}:
        return share(sum(sums), len(sums))
    return mean(sums, counts)


def _from_mean(figure: Result, value: float | None) -> float | None:
    """Returns the figure of a mean; None if it is unknown or too large."""
    try:
        return None if value is None else _SUMS[figure["aggregation"]][1](value)
    except OverflowError:
        return None


def differences(first: Measured, second: Measured) -> Result:
    """Returns the second model's figures minus the first's, example by example.

    For perplexities it is the difference of their logarithms.
    """
    metrics = []
    for (settings, before), (_, after) in zip(first, second, strict=True):
        others = {figure["metric"]: figure for figure in after["metrics"]}
        for figure in before["metrics"]:
            same = others.get(figure["metric"])
            if figure["sums"] is None or not same or same["counts"] != figure["counts"]:
                continue
            gap = mean_difference(figure["sums"], same["sums"], figure["counts"])
            metrics.append({"task": settings["task"], "metric": figure["metric"]} | asdict(gap))
    return {"metrics": metrics}
