"""The suite `tasks`: EleutherAI's lm_eval, which makes the requests and scores the answers.

A piece is some of the requests of a task, and its result are the answers. So a changed metric needs
no new measurement, and a changed document only those of the new requests.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from rgexport.errors import RequestError
from rgexport.evaluation import display
from rgexport.evaluation.figures import mean, mean_difference, share
from rgexport.evaluation.harness.answers import LmRequest, answer, sha256_of
from rgexport.evaluation.harness.tasks import Tasks, load_tasks
from rgexport.evaluation.models import EvaluatedModel
from rgexport.evaluation.pieces import Chain, EvaluationRequest, Measured, Piece, Result, Settings
from rgexport.reporting.chart import Chart
from rgexport.reporting.tables import Row, Table
from rgexport.runtimes.session import Session

NAME, UNIT, INDEPENDENT = "tasks", "", False
REQUESTS = 256
"""Requests of a piece."""
_TOKEN = 4  # approximate characters of a token
_SUMS: dict[str, tuple[Callable[[Any], tuple[float, float]], Callable[[float], float]]] = {
    "mean": (lambda value: (float(value), 1.0), float),
    "perplexity": (lambda log: (-log, 1.0), math.exp),
    "weighted_perplexity": (lambda pair: (-pair[0], pair[1]), math.exp),
    "bits_per_byte": (lambda pair: (-pair[0] / math.log(2), pair[1]), float),
}
"""lm_eval's aggregations that are functions of a mean: example → sum and weight; mean → figure.

A pair is a log-likelihood and its number of words or bytes."""


def chains(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Chain]:
    model.require_tokenizer(NAME)
    for task, requests in _tasks(request).requests.items():
        for first in range(0, len(requests), REQUESTS):
            part = requests[first : first + REQUESTS]
            settings = {"task": task, "first": first, "requests": len(part)}
            tokens = sum(len(instance.arguments) for instance in part) // _TOKEN
            yield [Piece(model.identity, NAME, settings | {"sha256": sha256_of(part)}, tokens)]


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    """Returns the answers to some requests of a task, and the tokens that were read for them."""
    assert model.tokenizer is not None
    part = _requests_of(_tasks(request), settings)
    if sha256_of(part) != settings["sha256"]:
        raise RequestError(f"the task {settings['task']} changed while it was measured; try again")
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
    return [
        (
            {"task": name},
            {
                "shots": tasks.shots.get(name),
                "tokens": tokens.get(name),
                "metrics": [figure | _sums(figure) for figure in figures],
            },
        )
        for name, figures in tasks.scores(answers).items()
    ]


def _sums(figure: Result) -> Result:
    """Returns the sums and weights of a figure's examples, None if it is no mean of them."""
    unknown = {"sums": None, "counts": None}
    if figure["value"] is None or not figure["values"] or figure["aggregation"] not in _SUMS:
        return unknown
    split, from_mean = _SUMS[figure["aggregation"]]
    try:
        sums, counts = zip(*map(split, figure["values"]), strict=True)
        same = math.isclose(from_mean(sum(sums) / sum(counts)), figure["value"], rel_tol=1e-6)
    except (TypeError, ValueError, ArithmeticError):
        return unknown
    return {"sums": sums, "counts": counts} if same else unknown


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
    for end in ("low", "high"):
        try:
            value = estimate[end]
            entry[end] = None if value is None else _SUMS[figure["aggregation"]][1](value)
        except OverflowError:
            entry[end] = None
    return entry | {"count": len(sums)}


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
            metrics.append({"task": settings["task"], "metric": figure["metric"]} | gap)
    return {"metrics": metrics}


def lost(model: Result) -> list[display.Loss]:
    """Returns the losses in figures, if lm_eval says whether higher ones are better."""
    better = {
        (entry["task"], figure["metric"]): figure["higher_is_better"]
        for entry in model["suites"][NAME]["tasks"]
        for figure in entry["metrics"]
    }
    losses = []
    for gap in display.differences_of(model, NAME, "metrics"):
        if (higher := better[gap["task"], gap["metric"]]) is not None:
            loss = display.loss_of(f"{gap['task']}, {gap['metric']}", gap)
            losses.append(loss._replace(value=-loss.value if higher else loss.value))
    return losses


def tables(models: display.Models) -> Iterator[Table]:
    rows: list[Row] = []
    for entries in display.by_entry(models, NAME, "tasks"):
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
        display.is_significant(gap["p"])
        for gap in display.differences_of(model, NAME, "metrics")
        if (gap["task"], gap["metric"]) == (task, figure["metric"])
    )
    known = figure["low"] is not None and figure["high"] is not None
    error = f" ± {_short((figure['high'] - figure['low']) / 2)}" if known else ""
    return f"{_short(figure['value'])}{error}{'*' * significant}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def charts(models: display.Models) -> list[Chart]:
    return []
