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
Found = tuple[Mapping[str, Any], Result]
"""The work of a piece, and what it gave."""


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
        (subject, [piece for name in names for piece in SUITES[name].pieces(subject, request)])
        for subject in subjects
    ]
    every = [piece for _, own in planned for piece in own]
    done = {piece.key: kept for piece in every if (kept := results.get(piece))}
    if done:
        note(f"{len(done)} of {len(every)} pieces are done already.")
    for subject, own in planned:
        if missing := [piece for piece in own if piece.key not in done]:
            done |= _measure(subject, missing, request, results)
    found = [_by_suite(names, own, done) for _, own in planned]
    models = [_summed(subject, own, found[0]) for subject, own in zip(subjects, found, strict=True)]
    asked = asdict(request) | {"texts": [str(path) for path in request.texts]}
    return {"request": asked, "environment": environment(), "models": models}


def _measure(
    subject: Subject, missing: Sequence[Piece], request: Request, results: Results
) -> dict[str, Result]:
    """What pieces give, by their keys; each is kept as soon as it is done."""
    done = {}
    session = subject.session()
    try:
        total = sum(piece.tokens for piece in missing)
        with task(f"Evaluating {subject.label}", total, "tokens") as advance:
            for piece in missing:
                began = time.perf_counter()
                found = SUITES[piece.suite].measure(subject, session, piece.work, request)
                done[piece.key] = found | {"seconds": time.perf_counter() - began}
                results.put(piece, done[piece.key])
                advance(piece.tokens)
    finally:
        session.close()
    return done


def _by_suite(
    names: Sequence[str], own: Sequence[Piece], done: Mapping[str, Result]
) -> dict[str, list[Found]]:
    return {
        name: [(piece.work, done[piece.key]) for piece in own if piece.suite == name]
        for name in names
    }


def _summed(
    subject: Subject, own: Mapping[str, list[Found]], first: Mapping[str, list[Found]]
) -> Result:
    """The figures of a model, and how they differ from the first one's."""
    suites = {name: SUITES[name].summary(found) for name, found in own.items()}
    model = {"label": subject.label, "bytes": subject.size, "suites": suites}
    if own is first:
        return model
    gaps = {name: SUITES[name].differences(first[name], found) for name, found in own.items()}
    return model | {"differences": gaps}
