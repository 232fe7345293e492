"""The suite `window`: the model with smaller attention windows, which it was not trained for.

The smallest window is 0: a token attends to itself alone, and only the recurrent states remember.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from rgexport.evaluation import display
from rgexport.evaluation.models import EvaluatedModel
from rgexport.evaluation.pieces import Chain, EvaluationRequest, Measured, Piece, Result, Settings
from rgexport.evaluation.suites import memory, text
from rgexport.evaluation.suites.length import step_seconds
from rgexport.reporting.chart import Chart
from rgexport.reporting.tables import Table
from rgexport.runtimes.session import Session
from rgexport.units import amount

NAME, UNIT, INDEPENDENT = "window", "nats per token in small windows", False
_DIVISORS = 1, 2, 4, 8
_INNER: dict[str, ModuleType] = {suite.NAME: suite for suite in (text, memory)}
"""The suites that are run with each window."""
_SPEED = "speed"
_STEPS = 48


def windows(full: int) -> list[int]:
    return list(dict.fromkeys([*(full // divisor for divisor in _DIVISORS), 0]))


def chains(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Chain]:
    """Yields for each window the texts, the tasks of `memory`, and a measurement of speed."""
    model.require_narrowing()
    model.require_tokenizer(NAME)
    for window in windows(model.config.window):
        for name, suite in _INNER.items():
            for chain in suite.chains(model, request):
                if chain[0].settings.get("context") is None:
                    settings = {"window": window, "suite": name}
                    yield [
                        replace(piece, suite=NAME, settings=settings | {"work": piece.settings})
                        for piece in chain
                    ]
        yield [Piece(model.identity, NAME, {"window": window, "suite": _SPEED}, _STEPS)]


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    """Returns the inner suite's result, or the time of a step and the bytes of the state."""
    if settings["suite"] != _SPEED:
        suite = _INNER[settings["suite"]]
        result: Result = suite.measure(model, session, settings["work"], request)
        return result
    random = np.random.default_rng(0)
    session.reset()
    session.prefill(random.integers(session.vocab_size, size=(1, model.config.window)))
    seconds = step_seconds(session, random.integers(session.vocab_size, size=_STEPS))
    return {"step_seconds": float(np.median(seconds)), "state_bytes": session.info.state_bytes}


def summary(measured: Measured) -> Result:
    """Returns the inner suites' figures by window, and their differences to the full window.

    `all_texts` is the loss over all domains.
    """
    by_window = _by_window(measured)
    full = next(iter(by_window.values()))
    return {"windows": [_of_window(window, by_window[window], full) for window in by_window]}


def _of_window(window: int, suites: Mapping[str, Measured], full: Mapping[str, Measured]) -> Result:
    speed = suites[_SPEED][0][1]
    row = {key: speed[key] for key in ("step_seconds", "state_bytes")} | {"window": window}
    for name, suite in _INNER.items():
        row[name] = suite.summary(suites[name])
        row[f"{name}_above_full"] = suite.differences(full[name], suites[name])
    texts, full_texts = (
        [({**settings, "domain": "all"}, result) for settings, result in measured[text.NAME]]
        for measured in (suites, full)
    )
    (row["all_texts"],) = text.summary(texts)["domains"]
    (gap,) = text.differences(full_texts, texts)["domains"]
    row["all_texts_above_full"] = gap["nll"]
    return row


def differences(first: Measured, second: Measured) -> Result:
    """Returns the inner suites' differences for each window that both models have."""
    others = _by_window(second)
    entries: list[Result] = []
    for window, suites in _by_window(first).items():
        if window in others:
            after = others[window]
            gaps = {n: s.differences(suites[n], after[n]) for n, s in _INNER.items()}
            entries.append({"window": window} | gaps)
    return {"windows": entries}


def _by_window(measured: Measured) -> dict[int, dict[str, Measured]]:
    """Returns window → inner suite → settings and results of its pieces."""
    groups: dict[int, dict[str, Any]] = {}
    for settings, result in measured:
        suites = groups.setdefault(settings["window"], {})
        suites.setdefault(settings["suite"], []).append((settings.get("work", {}), result))
    return groups


def lost(model: Result) -> list[display.Loss]:
    """Returns the losses of texts with each window but the full one."""
    return [
        display.loss_of(f"{gap['domain']} with a window of {entry['window']:,}", gap["nll"])
        for entry in display.differences_of(model, NAME, "windows")[1:]
        for gap in entry["text"]["domains"]
    ]


def tables(models: display.Models) -> Iterator[Table]:
    rows = [
        (
            model["label"],
            f"{row['window']:,}",
            f"{row['all_texts']['perplexity']:.3f}",
            display.difference_cell(row["all_texts_above_full"]),
            amount(row["state_bytes"]),
            f"{1000 * row['step_seconds']:.2f}",
        )
        for model in models
        for row in model["suites"][NAME]["windows"]
    ]
    header = ("model", "window", "perplexity", "more nats", "state", "ms/token")
    title = "Windows: perplexity of all texts, nats above the full window, state, time of a step"
    yield Table(title, header, rows, header[1:])
    for model in models:
        yield from memory.tables(_as_models(model))


def charts(models: display.Models) -> Iterator[Chart]:
    points = [
        [(max(1, w["window"]), w["all_texts"]["nll"]) for w in m["suites"][NAME]["windows"]]
        for m in models
    ]
    summary = "Mean loss of all texts; a window of 0 is drawn at 1."
    yield from display.loss_curves(
        "Loss by window", summary, "tokens of window", models, points, lost
    )
    for model in models:
        for chart in memory.charts(_as_models(model)):
            yield replace(chart, title=f"{model['label']}: {chart.title}")


def _as_models(model: Result) -> list[Result]:
    """Returns the figures of a model's windows in the form of several models' figures."""
    return [
        {
            "label": f"{model['label']}, {row['window']:,}",
            "suites": {memory.NAME: row["memory"]},
            "differences": {memory.NAME: row["memory_above_full"]},
        }
        for row in model["suites"][NAME]["windows"]
    ]
