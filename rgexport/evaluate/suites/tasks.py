"""The suite `tasks`: EleutherAI's lm_eval, which asks, and scores the answers.

A piece is some of the requests of a task, and what it gives are the answers. So a change of a
metric asks nothing again, and a change of a document asks only for what is new.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rgexport.errors import RequestError
from rgexport.evaluate.figures import Estimate, mean, mean_difference, share
from rgexport.evaluate.harness.answers import Asked, answered, sha256_of
from rgexport.evaluate.harness.tasks import Scores, Tasks, load_tasks
from rgexport.evaluate.pieces import Piece, Result
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.runtimes.session import Session

NAME = "tasks"
REQUESTS = 256
"""Of a piece."""
_TOKEN = 4
"""Characters, about."""
_Found = Sequence[tuple[Mapping[str, Any], Result]]


def _itself(value: float) -> float:
    return value


_SUMS: dict[str, tuple[Callable[[Any], tuple[float, float]], Callable[[float], float]]] = {
    "mean": (lambda value: (float(value), 1.0), _itself),
    "perplexity": (lambda log: (-log, 1.0), math.exp),
    "weighted_perplexity": (lambda pair: (-pair[0], pair[1]), math.exp),
    "bits_per_byte": (lambda pair: (-pair[0] / math.log(2), pair[1]), _itself),
}
"""lm_eval's aggregations that are means: an example's sum and weight, and what is made of the mean.

The first of a pair is a log likelihood, the second the words or bytes of it.
"""


def pieces(subject: Subject, request: Request) -> Iterator[Piece]:
    """A piece for each part of a task's requests."""
    subject.require_tokenizer(NAME)
    for task, asked in _tasks(request).asked.items():
        for first in range(0, len(asked), REQUESTS):
            part = asked[first : first + REQUESTS]
            work = {"task": task, "first": first, "requests": len(part), "sha256": sha256_of(part)}
            tokens = sum(len(one.arguments) for one in part) // _TOKEN
            yield Piece(subject.identity, NAME, work, tokens)


def measure(
    subject: Subject, session: Session, work: Mapping[str, Any], request: Request
) -> Result:
    """The answers to some requests of a task, and the tokens that were read for them."""
    assert subject.tokenizer is not None
    part = _part(_tasks(request), work)
    if sha256_of(part) != work["sha256"]:
        raise RequestError(f"the task {work['task']} has changed while it was measured; try again")
    return answered(subject.tokenizer, session, part)


def _tasks(request: Request) -> Tasks:
    return load_tasks(request.tasks, request.task_files, request.examples, request.seed)


def _part(tasks: Tasks, work: Mapping[str, Any]) -> list[Asked]:
    return tasks.asked[work["task"]][work["first"] : work["first"] + work["requests"]]


def scored(found: _Found, request: Request) -> list[tuple[Mapping[str, Any], Result]]:
    """What lm_eval makes of the answers: the figures of each task, and of each group."""
    tasks, answers = _tasks(request), dict[Asked, Any]()
    read: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for work, result in found:
        answers |= zip(_part(tasks, work), result["answers"], strict=True)
        for index, key in enumerate(("read", "asked")):
            read[work["task"]][index] += result[key]
    figures = defaultdict(list)
    for score in tasks.scores(answers):
        figures[score.task].append(_figure(score))
    entries: list[tuple[Mapping[str, Any], Result]] = []
    for name, metrics in figures.items():
        counts = {"shots": tasks.shots.get(name), "tokens": read.get(name)}
        entries.append(({"task": name}, counts | {"metrics": metrics}))
    return entries


def _figure(score: Scores) -> Result:
    """A figure with the sums and weights of its examples, None where it is no mean of them."""
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
    split, shown = _SUMS[score.aggregation]
    try:
        sums, counts = zip(*map(split, score.values), strict=True)
        same = math.isclose(shown(sum(sums) / sum(counts)), score.value, rel_tol=1e-6)
    except (TypeError, ValueError, ArithmeticError):
        return figure
    return figure | {"sums": sums, "counts": counts} if same else figure


def summary(found: _Found) -> Result:
    """By task or group, in their order: the figures and their intervals, and the tokens read."""
    return {
        "tasks": [
            {
                "task": work["task"],
                "shots": result["shots"],
                "tokens": result["tokens"],
                "metrics": [_interval(figure) for figure in result["metrics"]],
            }
            for work, result in found
        ]
    }


def _interval(figure: Result) -> Result:
    """A figure with its interval, and how many examples it is of."""
    shown = {key: figure[key] for key in ("metric", "value", "higher_is_better")}
    if figure["sums"] is None:
        return shown | {"low": None, "high": None, "count": None}
    found = _estimate(figure["sums"], figure["counts"])
    low, high = (_shown(figure, end) for end in (found.low, found.high))
    return shown | {"low": low, "high": high, "count": len(figure["sums"])}


def _estimate(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    if {*counts} == {1.0} and {*sums} <= {0.0, 1.0}:
        return share(sum(sums), len(sums))
    return mean(sums, counts)


def _shown(figure: Result, value: float | None) -> float | None:
    """What is made of the mean; None if unknown, or too large."""
    try:
        return None if value is None else _SUMS[figure["aggregation"]][1](value)
    except OverflowError:
        return None


def differences(first: _Found, second: _Found) -> Result:
    """What a second model's figures are above the first's, example by example.

    Of perplexities it is the difference of their logarithms.
    """
    metrics = []
    for (work, one), (_, other) in zip(first, second, strict=True):
        others = {figure["metric"]: figure for figure in other["metrics"]}
        for figure in one["metrics"]:
            twin = others.get(figure["metric"])
            if figure["sums"] is None or not twin or twin["counts"] != figure["counts"]:
                continue
            gap = mean_difference(figure["sums"], twin["sums"], figure["counts"])
            metrics.append({"task": work["task"], "metric": figure["metric"]} | asdict(gap))
    return {"metrics": metrics}
