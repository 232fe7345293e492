"""Runs suites: opens each model once, does what is missing, and sums up."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rgexport.errors import RequestError
from rgexport.evaluate.pieces import Piece, Result, Results
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.evaluate.suites import memory, noise, text
from rgexport.progress import note, task
from rgexport.runtimes.environment import environment

SUITES: dict[str, ModuleType] = {suite.NAME: suite for suite in (text, memory, noise)}
"""Name → module with `pieces`, `measure`, `summary` and `differences`."""


def require_known(names: Sequence[str]) -> list[str]:
    """The suites that are asked for; all where none is.

    Raises:
        RequestError: there is no such suite.
    """
    for name in names:
        if name not in SUITES:
            raise RequestError(f"--suite is {name!r}; expected one of {', '.join(SUITES)}")
    return [name for name in SUITES if name in names] if names else list(SUITES)


def evaluate(
    subjects: Sequence[Subject], names: Sequence[str], request: Request, folder: Path
) -> Result:
    """All suites on all models; what `folder` has is not done again.

    Raises:
        RequestError: a model or a text does not fit a suite, or cannot be opened.
    """
    if request.farthest is None:
        window = max(subject.config.window for subject in subjects)
        request = replace(request, farthest=memory.farthest(window))
    results = Results(folder)
    planned = [
        (subject, name, piece)
        for subject in subjects
        for name in names
        for piece in SUITES[name].pieces(subject, request)
    ]
    missing = [entry for entry in planned if results.get(entry[2]) is None]
    if len(missing) < len(planned):
        note(f"{len(planned) - len(missing)} of {len(planned)} pieces are done already.")
    for subject in subjects:
        own = [(name, piece) for one, name, piece in missing if one is subject]
        if own:
            _measure(subject, own, request, results)
    return _summed(subjects, names, planned, results, request)


def _measure(
    subject: Subject, own: Sequence[tuple[str, Piece]], request: Request, results: Results
) -> None:
    session = subject.session()
    try:
        total = sum(piece.tokens for _, piece in own)
        with task(f"Evaluating {subject.label}", total, "tokens") as advance:
            for name, piece in own:
                began = time.perf_counter()
                found = SUITES[name].measure(subject, session, piece.work, request)
                results.put(piece, found | {"seconds": time.perf_counter() - began})
                advance(piece.tokens)
    finally:
        session.close()


def _summed(
    subjects: Sequence[Subject],
    names: Sequence[str],
    planned: Sequence[tuple[Subject, str, Piece]],
    results: Results,
    request: Request,
) -> Result:
    def found(subject: Subject, name: str) -> list[tuple[Mapping[str, Any], Result]]:
        own = (p for one, suite, p in planned if one is subject and suite == name)
        return [(piece.work, result) for piece in own if (result := results.get(piece))]

    models: list[dict[str, Any]] = []
    for subject in subjects:
        suites = {name: SUITES[name].summary(found(subject, name)) for name in names}
        model = {"label": subject.label, "bytes": subject.size, "suites": suites}
        if subject is not subjects[0]:
            model["differences"] = {
                name: SUITES[name].differences(found(subjects[0], name), found(subject, name))
                for name in names
            }
        models.append(model)
    asked = asdict(request) | {"texts": [str(path) for path in request.texts]}
    return {"request": asked, "environment": environment(), "models": models}
