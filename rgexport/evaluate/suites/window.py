"""The suite `window`: the same model with smaller attention windows, never trained for them.

The smallest is 0: a token sees only itself, and only the recurrent states remember.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from rgexport.evaluate.pieces import Piece, Result
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.evaluate.suites import memory, text
from rgexport.evaluate.suites.length import timed
from rgexport.runtimes.session import Session

NAME = "window"
_PARTS = 1, 2, 4, 8
_INNER: dict[str, ModuleType] = {suite.NAME: suite for suite in (text, memory)}
_SPEED = "speed"
_STEPS = 48
Found = Sequence[tuple[Mapping[str, Any], Result]]


def windows(full: int) -> list[int]:
    """The full window, its half, quarter and eighth, and 0."""
    return list(dict.fromkeys([*(full // part for part in _PARTS), 0]))


def pieces(subject: Subject, request: Request) -> Iterator[Piece]:
    """For each window: the texts, the tasks of `memory`, and the time of a step.

    Raises:
        RequestError: no layer of the model has attention, its window cannot be changed, or it has
            no tokenizer.
    """
    subject.require_narrowing()
    subject.require_tokenizer(NAME)
    for window in windows(subject.window):
        for suite in _INNER.values():
            before: Piece | None = None
            for inner in suite.pieces(subject, request):
                if inner.work.get("context") is not None:
                    continue
                work = {"window": window, "suite": suite.NAME, "work": inner.work}
                after = before.key if before and inner.after else None
                before = replace(inner, suite=NAME, work=work, after=after)
                yield before
        yield Piece(subject.identity, NAME, {"window": window, "suite": _SPEED}, _STEPS)


def measure(
    subject: Subject, session: Session, work: Mapping[str, Any], request: Request
) -> Result:
    """As the suite within; or seconds of a step behind a full window, and bytes of state."""
    if work["suite"] != _SPEED:
        found: Result = _INNER[work["suite"]].measure(subject, session, work["work"], request)
        return found
    random = np.random.default_rng(0)
    full = subject.window
    session.reset()
    session.prefill(random.integers(session.vocab_size, size=(1, full)))
    seconds = timed(session, random.integers(session.vocab_size, size=_STEPS))
    return {"step_seconds": float(np.median(seconds)), "state_bytes": session.info.state_bytes}


def summary(found: Found) -> Result:
    """For each window what the suites within say, also beside the full one.

    `all_texts` is the loss over all domains.
    """
    own = _by_window(found)
    full = next(iter(own.values()))
    return {"windows": [_of_window(window, own[window], full) for window in own]}


def _of_window(window: int, own: Mapping[str, Found], full: Mapping[str, Found]) -> Result:
    speed = own[_SPEED][0][1]
    row = {key: speed[key] for key in ("step_seconds", "state_bytes")} | {"window": window}
    for name, suite in _INNER.items():
        row[name] = suite.summary(own[name])
        row[f"{name}_above_full"] = suite.differences(full[name], own[name])
    texts, full_texts = (_in_one_domain(found[text.NAME]) for found in (own, full))
    (row["all_texts"],) = text.summary(texts)["domains"]
    (gap,) = text.differences(full_texts, texts)["domains"]
    row["all_texts_above_full"] = gap["nll"]
    return row


def _in_one_domain(found: Found) -> Found:
    return [({**work, "domain": "all"}, result) for work, result in found]


def differences(first: Found, second: Found) -> Result:
    """For each window that both have, as the suites within."""
    others = _by_window(second)
    return {
        "windows": [
            {"window": window}
            | {name: s.differences(own[name], others[window][name]) for name, s in _INNER.items()}
            for window, own in _by_window(first).items()
            if window in others
        ]
    }


def _by_window(found: Found) -> dict[int, dict[str, Found]]:
    """Window → suite → the works within, and what they gave."""
    groups: dict[int, dict[str, Any]] = {}
    for work, result in found:
        suites = groups.setdefault(work["window"], {})
        suites.setdefault(work["suite"], []).append((work.get("work", {}), result))
    return groups
