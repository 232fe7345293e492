"""The suite `tasks`: EleutherAI's lm_eval, which makes the requests and scores the answers.

A piece is some of the requests of a task, and its result are the answers. So a changed metric needs
no new measurement, and a changed document only those of the new requests.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rgexport.errors import RequestError
from rgexport.evaluate.display import Models, by_entry, differences_of, is_significant
from rgexport.evaluate.figures import mean, mean_difference, share
from rgexport.evaluate.harness.answers import LmRequest, answer, sha256_of
from rgexport.evaluate.harness.tasks import Score, Tasks, load_tasks
from rgexport.evaluate.models import EvaluatedModel
from rgexport.evaluate.pieces import EvaluationRequest, Measured, Piece, Result, Settings
from rgexport.reporting.chart import Chart
from rgexport.reporting.tables import Row, Table
from rgexport.runtimes.session import Session

NAME = "tasks"
REQUESTS = 256
"""Requests of a piece."""
_TOKEN = 4
"""Approximate characters of a token."""
_SUMS: dict[str, tuple[Callable[[Any], tuple[float, float]], Callable[[float], float]]] = {
    "mean": (lambda value: (float(value), 1.0), float),
    "perplexity": (lambda log: (-log, 1.0), math.exp),
    "weighted_perplexity": (lambda pair: (-pair[0], pair[1]), math.exp),
    "bits_per_byte": (lambda pair: (-pair[0] / math.log(2), pair[1]), float),
}
"""lm_eval's aggregations that are functions of a mean: example → sum and weight; mean → figure.

A pair is a log-likelihood and its number of words or bytes."""


def pieces(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Piece]:
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
    entries: list[tuple[Settings, Result]] = []
    for name, metrics in figures.items():
        read = {"shots": tasks.shots.get(name), "tokens": tokens.get(name)}
        entries.append(({"task": name}, read | {"metrics": metrics}))
    return entries


def _figure(score: Score) -> Result:
    """Returns a figure with the sums and weights of its examples, None if it is no mean of them."""
    known = "metric", "value", "higher_is_better", "aggregation"
    figure: Result = {key: getattr(score, key) for key in known} | {"sums": None, "counts": None}
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
            {**settings, **result, "metrics": [_with_interval(f) for f in result["metrics"]]}
            for settings, result in measured
        ]
    }


def _with_interval(figure: Result) -> Result:
    entry = {key: figure[key] for key in ("metric", "value", "higher_is_better")}
    sums, counts = figure["sums"], figure["counts"]
    if sums is None:
        return entry | {"low": None, "high": None, "count": None}
    is_share = {*counts} == {1.0} and {*sums} <= {0.0, 1.0}
    estimate = share(sum(sums), len(sums)) if is_share else mean(sums, counts)
    low, high = (_from_mean(figure, end) for end in (estimate.low, estimate.high))
    return entry | {"low": low, "high": high, "count": len(sums)}


def _from_mean(figure: Result, value: float | None) -> float | None:
    try:
        return None if value is None else _SUMS[figure["aggregation"]][1](value)
    except OverflowError:
        return None


def differences(first: Measured, second: Measured) -> Result:
    """Returns the second model's figures, or logarithms of perplexities, minus the first's."""
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


def tables(models: Models) -> Iterator[Table]:
    rows: list[Row] = []
    for entries in by_entry(models, NAME, "tasks"):
        first = entries[0]
        for metric, figure in enumerate(first["metrics"]):
            count = "" if figure["count"] is None else f"{figure['count']:,}"
            cells = [
                _figure_cell(entry["metrics"][metric], model, entry["task"])
                for entry, model in zip(entries, models, strict=True)
            ]
            rows.append((first["task"], figure["metric"], count, *cells))
        if first["tokens"]:
            cells = ["{:,} of {:,}".format(*entry["tokens"]) for entry in entries]
            rows.append((first["task"], "tokens read", "", *cells))
    labels = [model["label"] for model in models]
    title = (
        "Tasks of lm_eval, with their 95 % interval; of their tokens, those that begin alike are "
        f"read once; * differs from {labels[0]} (p < 0.05)"
    )
    header = ("task", "figure", "examples", *labels)
    yield Table(title, header, rows, header[2:])


def _figure_cell(figure: Result, model: Result, task: str) -> str:
    if figure["value"] is None:
        return "unknown"
    significant = any(
        is_significant(gap["p"])
        for gap in differences_of(model, NAME, "metrics")
        if (gap["task"], gap["metric"]) == (task, figure["metric"])
    )
    known = figure["low"] is not None and figure["high"] is not None
    error = f" ± {_short((figure['high'] - figure['low']) / 2)}" if known else ""
    return f"{_short(figure['value'])}{error}{'*' * significant}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def charts(models: Models) -> list[Chart]:
    return []
