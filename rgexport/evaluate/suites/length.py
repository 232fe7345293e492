"""The suite `length`: one long text, of a million tokens and more.

A piece reads some thousand tokens and passes its state on to the next one. At marks (8K, 16K, …)
the states are recorded, steps are timed, and a state file is written: any engine, on this machine
or another, continues from it with `--state`.
"""

import hashlib
import json
import time
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.chat.state_file import (
    SavedState,
    key_of,
    read_state,
    read_state_header,
    require_same_model,
    write_state,
)
from rgexport.errors import RequestError
from rgexport.evaluate.figures import mean, mean_difference
from rgexport.evaluate.losses import block_sums, further_losses
from rgexport.evaluate.models import EvaluatedModel
from rgexport.evaluate.pieces import Measured, Piece, Result, Settings, chained
from rgexport.evaluate.request import EvaluationRequest
from rgexport.evaluate.suites.text import LONGEST_TOKEN, documents
from rgexport.griffin.state import State
from rgexport.runtimes.memory import rss_bytes
from rgexport.runtimes.session import Session

NAME = "length"
FIRST = 1 << 13
"""Tokens up to the first mark; each further mark is twice as far."""
_PIECE = 1 << 13
_BLOCK = 1024
"""Tokens per stored sum of losses."""
_STEPS = 16
"""Steps that are timed together."""
_TURNS = 24
_STATE = ".rg_lru"


def marks(start: int, last: int) -> list[int]:
    """Returns 8K, 16K, … and `last`, without the marks up to `start`."""
    values, mark = [], FIRST
    while mark < last:
        values.append(mark)
        mark *= 2
    return [mark for mark in [*values, last] if mark > start]


def pieces(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Piece]:
    """Yields a chain of pieces through the text; the last one times steps at both ends.

    Raises:
        RequestError: the state file is of another model or text, or beyond the end.
    """
    model.require_tokenizer(NAME)
    text, end = _text(model, request), request.length
    start, marked = text["start"], marks(text["start"], end)
    stops = sorted({*marked, *range(start + _PIECE, end, _PIECE)})
    chain = [
        Piece(
            model.identity,
            NAME,
            text | {"from": first, "to": stop, "mark": stop in marked},
            stop - first,
        )
        for first, stop in zip([start, *stops], stops, strict=False)
    ]
    if len(marked) > 1:
        settings = text | {"turns": [marked[0], marked[-1]]}
        chain.append(Piece(model.identity, NAME, settings, 2 * _TURNS * _STEPS))
    yield from chained(chain)


@lru_cache(maxsize=1)
def _text(model: EvaluatedModel, request: EvaluationRequest) -> dict[str, Any]:
    ids = key_of(_ids(model, request)[: request.length + 1])[1]
    if request.state is None:
        return {"ids": ids, "start": 0, "state": None}
    saved = _saved(model, request)
    return {"ids": ids, "start": saved.position, "state": read_state_header(request.state).sha256}


def _saved(model: EvaluatedModel, request: EvaluationRequest) -> SavedState:
    assert request.state is not None
    saved = read_state(request.state, model.state_shapes)
    require_same_model(request.state, saved, model.state_identity)
    if saved.position >= request.length:
        raise RequestError(
            f"{request.state} has seen {saved.position} tokens; expected fewer than "
            f"{request.length}: pass a larger --length"
        )
    if saved.key != key_of(_ids(model, request)[: saved.position]):
        raise RequestError(
            f"{request.state} has seen another text; pass the texts that it was made with (--text)"
        )
    return saved


def _ids(model: EvaluatedModel, request: EvaluationRequest) -> np.ndarray:
    return _text_ids(model, request.texts, request.length + 1 + _STEPS)


@lru_cache(maxsize=1)
def _text_ids(model: EvaluatedModel, texts: tuple[Path, ...], count: int) -> np.ndarray:
    longest = count * LONGEST_TOKEN
    text = "\n\n".join(document.text[:longest] for document in documents(texts))[:longest]
    ids = np.array(model.encode(text), np.int64)
    if not len(ids):
        raise RequestError("the texts are empty")
    bos = np.array(model.bos, np.int64)
    return np.concatenate([bos, np.resize(ids, count - len(bos))])


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    """Returns sums of losses; at a mark also norms, states and times.

    Raises:
        RequestError: the texts or the state file are not those of the piece.
    """
    if any(settings[name] != value for name, value in _text(model, request).items()):
        raise RequestError("the texts of length have changed, or a worker has others")
    ids = _ids(model, request)
    if "turns" in settings:
        return _steps_in_turns(model, session, settings["turns"], ids, request)
    first, stop = settings["from"], settings["to"]
    if first == 0:
        session.reset()
    elif first == settings["start"]:
        session.set_state(_saved(model, request).state)
    began = time.perf_counter()
    values = further_losses(session, ids[first : stop + 1])
    seconds = time.perf_counter() - began
    result = block_sums(values, _BLOCK) | {"prefill_seconds": seconds}
    return result | (_at_mark(model, session, stop, ids, request) if settings["mark"] else {})


def _at_mark(
    model: EvaluatedModel,
    session: Session,
    position: int,
    ids: np.ndarray,
    request: EvaluationRequest,
) -> Result:
    """Records the recurrent states and the time of a step, and writes a state file."""
    state = session.get_state()
    recurrent = {name: a[0] for name, a in state.items() if name.endswith(_STATE)}
    result = {
        "step_seconds": float(np.median(step_seconds(session, ids[position : position + _STEPS]))),
        "rss_bytes": rss_bytes(),
        "norms": {name: float(np.linalg.norm(array)) for name, array in recurrent.items()},
        "states": {name: _packed(array) for name, array in recurrent.items()},
    }
    session.set_state(state)
    key = key_of(ids[:position])
    saved = SavedState(model.state_identity, key, state, engine=session.info.engine)
    path = state_file(model, position, request)
    path.parent.mkdir(exist_ok=True)
    write_state(path, saved)
    return result


def state_file(model: EvaluatedModel, position: int, request: EvaluationRequest) -> Path:
    """Returns the path of the state after `position` tokens, for this model, text and start."""
    facts = json.dumps([model.identity, _text(model, request)], sort_keys=True)
    name = f"{model.label}-{position}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    return request.folder / "states" / f"{name}.safetensors"


def _steps_in_turns(
    model: EvaluatedModel,
    session: Session,
    positions: Sequence[int],
    ids: np.ndarray,
    request: EvaluationRequest,
) -> Result:
    """Times a step at two marks in turns, as the machine's speed varies; seconds [2, turns]."""
    states = [_state_at(model, position, request) for position in positions]
    seconds: list[list[float]] = [[], []]
    for _ in range(_TURNS):
        for times, position, state in zip(seconds, positions, states, strict=True):
            session.set_state(state)
            steps = step_seconds(session, ids[position : position + _STEPS])
            times.append(float(np.median(steps)))
    return {"positions": list(positions), "step_seconds": seconds}


def _state_at(model: EvaluatedModel, position: int, request: EvaluationRequest) -> State:
    path = state_file(model, position, request)
    if not path.is_file():
        raise RequestError(f"{path} is gone; pass another folder with -o")
    return read_state(path, model.state_shapes).state


def step_seconds(session: Session, ids: np.ndarray) -> list[float]:
    """Returns the seconds of each step but the first, which binds buffers."""
    seconds = []
    for token in ids:
        began = time.perf_counter()
        session.step(np.array([token]))
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _packed(array: np.ndarray) -> str:
    return b64encode(np.asarray(array, "<f4").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), "<f4").astype(np.float64)


def summary(measured: Measured) -> Result:
    """Returns a point for each mark: the loss since the mark before, speeds, memory, state norms.

    `turns` is the time of a step at the last mark as a multiple of that at the first.
    """
    points = []
    for mark, results in _by_mark(measured).items():
        sums, counts = _joined(results, "sums"), _joined(results, "counts")
        nll, last = mean(sums, counts), results[-1]
        seconds = sum(result["prefill_seconds"] for result in results)
        points.append(
            {
                "to": mark,
                "nll": [nll.value, nll.low, nll.high],
                "prefill_tokens_per_second": sum(counts) / seconds,
                **{key: last[key] for key in ("step_seconds", "rss_bytes", "norms")},
            }
        )
    turns = next((result for settings, result in measured if "turns" in settings), None)
    start = measured[0][0]["start"]
    return {"start": start, "points": points, "turns": turns and _ratio(turns)}


def _ratio(turns: Result) -> Result:
    first, last = map(np.array, turns["step_seconds"])
    return {
        "positions": turns["positions"],
        "step_seconds": [float(np.median(first)), float(np.median(last))],
        "ratio": float(np.median(last / first)),
    }


def differences(first: Measured, second: Measured) -> Result:
    """Returns the second model's loss minus the first's, and the distance of their states.

    `states` is the largest difference in the worst layer, relative to that layer's largest value.
    There are no points if the two models read other ids.
    """
    texts = [[(s["ids"], s["to"]) for s, _ in side if "to" in s] for side in (first, second)]
    if texts[0] != texts[1]:
        return {"points": []}
    points = []
    second_by_mark = _by_mark(second)
    for mark, before in _by_mark(first).items():
        after = second_by_mark[mark]
        sums = _joined(before, "sums"), _joined(after, "sums")
        gap = mean_difference(*sums, _joined(before, "counts"))
        states = _state_distance(before[-1]["states"], after[-1]["states"])
        points.append({"to": mark, "nll": asdict(gap), "states": states})
    return {"points": points}


def _state_distance(before: Mapping[str, str], after: Mapping[str, str]) -> float | None:
    gaps = []
    for name in before.keys() & after.keys():
        a, b = _unpacked(before[name]), _unpacked(after[name])
        gaps.append(abs(a - b).max() / (abs(a).max() or 1.0))
    return float(max(gaps)) if gaps else None


def _by_mark(measured: Measured) -> dict[int, list[Result]]:
    """Returns mark → the results since the mark before."""
    groups: dict[int, list[Result]] = defaultdict(list)
    waiting: list[Result] = []
    for settings, result in measured:
        if "to" in settings:
            waiting.append(result)
            if settings["mark"]:
                groups[settings["to"]], waiting = waiting, []
    return groups


def _joined(results: Sequence[Result], name: str) -> list[float]:
    return [value for result in results for value in result[name]]
