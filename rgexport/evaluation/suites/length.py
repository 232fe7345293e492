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
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.chat import state_file as files
from rgexport.chat.state_file import key_of
from rgexport.errors import RequestError
from rgexport.evaluation import display
from rgexport.evaluation.figures import ends, mean, mean_difference
from rgexport.evaluation.losses import block_sums, further_losses, joined, require_finite
from rgexport.evaluation.models import EvaluatedModel
from rgexport.evaluation.pieces import Chain, EvaluationRequest, Measured, Piece, Result, Settings
from rgexport.evaluation.suites.memory import doublings
from rgexport.evaluation.suites.text import LONGEST_TOKEN, documents
from rgexport.reporting.chart import Chart
from rgexport.reporting.tables import Row, Table
from rgexport.runtimes.machine import rss_bytes
from rgexport.runtimes.session import Session
from rgexport.units import amount

NAME, UNIT, INDEPENDENT = "length", "nats per token of a long text", True
FIRST = 1 << 13
"""Tokens up to the first mark; each further mark is twice as far."""
_PIECE = 1 << 13
_BLOCK = 1024  # tokens per stored sum of losses
_STEPS = 16  # steps that are timed together
_TURNS = 24
_STATE = ".rg_lru"


def chains(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Chain]:
    """Yields one chain through the text; its last piece times steps at both ends."""
    model.require_tokenizer(NAME)
    text, end = _text(model, request), request.length
    start = text["start"]
    marked = [mark for mark in doublings(FIRST, end) if mark > start]
    stops = sorted({*marked, *range(start + _PIECE, end, _PIECE)})
    chain = []
    for first, stop in zip([start, *stops], stops, strict=False):
        settings = text | {"from": first, "to": stop, "mark": stop in marked}
        chain.append(Piece(model.identity, NAME, settings, stop - first))
    if len(marked) > 1:
        settings = text | {"turns": [marked[0], marked[-1]]}
        chain.append(Piece(model.identity, NAME, settings, 2 * _TURNS * _STEPS))
    yield chain


@lru_cache(maxsize=1)
def _text(model: EvaluatedModel, request: EvaluationRequest) -> dict[str, Any]:
    ids = key_of(_ids(model, request)[: request.length + 1])[1]
    if request.state is None:
        return {"ids": ids, "start": 0, "state": None}
    sha256 = files.read_state_header(request.state).sha256
    return {"ids": ids, "start": _saved(model, request).position, "state": sha256}


def _saved(model: EvaluatedModel, request: EvaluationRequest) -> files.SavedState:
    assert request.state is not None
    saved = files.read_state(request.state, model.state_shapes)
    files.require_same_model(request.state, saved, model.state_identity)
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


@lru_cache(maxsize=1)
def _ids(model: EvaluatedModel, request: EvaluationRequest) -> np.ndarray:
    count = request.length + 1 + _STEPS
    longest = count * LONGEST_TOKEN
    texts = (document.text[:longest] for document in documents(request.texts))
    text = "\n\n".join(texts)[:longest]
    ids = np.array(model.encode(text), np.int64)
    if not len(ids):
        raise RequestError("the texts are empty")
    bos = np.array(model.bos, np.int64)
    return np.concatenate([bos, np.resize(ids, count - len(bos))])


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    """Returns sums of losses; at a mark also norms, states and times."""
    if any(settings[name] != value for name, value in _text(model, request).items()):
        raise RequestError("the texts of length have changed, or a worker has others")
    if "turns" in settings:
        return _steps_in_turns(model, session, settings["turns"], request)
    first, stop = settings["from"], settings["to"]
    if first == 0:
        session.reset()
    elif first == settings["start"]:
        session.set_state(_saved(model, request).state)
    began = time.perf_counter()
    values = further_losses(session, _ids(model, request)[first : stop + 1])
    seconds = time.perf_counter() - began
    result = block_sums(values, _BLOCK) | {"prefill_seconds": seconds}
    return result | (_at_mark(model, session, stop, request) if settings["mark"] else {})


def _at_mark(
    model: EvaluatedModel, session: Session, position: int, request: EvaluationRequest
) -> Result:
    """Records the recurrent states and the time of a step, and writes a state file."""
    state, ids = session.get_state(), _ids(model, request)
    recurrent = {name: a[0] for name, a in state.items() if name.endswith(_STATE)}
    norms = {name: float(np.linalg.norm(array)) for name, array in recurrent.items()}
    require_finite(np.array([*norms.values()]), "states")
    result = {
        "step_seconds": float(np.median(step_seconds(session, ids[position : position + _STEPS]))),
        "rss_bytes": rss_bytes(),
        "norms": norms,
        "states": {
            name: b64encode(np.asarray(array, "<f4").tobytes()).decode()
            for name, array in recurrent.items()
        },
    }
    session.set_state(state)
    path = state_file(model, position, request)
    path.parent.mkdir(exist_ok=True)
    key, engine = key_of(ids[:position]), session.info.engine
    files.write_state(path, files.SavedState(model.state_identity, key, state, engine=engine))
    return result


def state_file(model: EvaluatedModel, position: int, request: EvaluationRequest) -> Path:
    facts = json.dumps([model.identity, _text(model, request)], sort_keys=True)
    name = f"{model.label}-{position}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    return request.folder / "states" / f"{name}.safetensors"


def _steps_in_turns(
    model: EvaluatedModel, session: Session, positions: Sequence[int], request: EvaluationRequest
) -> Result:
    """Times a step at two marks in turns, as the machine's speed varies; seconds [2, turns]."""
    paths = [state_file(model, position, request) for position in positions]
    if lost := [path for path in paths if not path.is_file()]:
        raise RequestError(f"{lost[0]} is gone; pass another folder with -o")
    states = [files.read_state(path, model.state_shapes).state for path in paths]
    seconds: list[list[float]] = [[], []]
    ids = _ids(model, request)
    for _ in range(_TURNS):
        for times, position, state in zip(seconds, positions, states, strict=True):
            session.set_state(state)
            steps = step_seconds(session, ids[position : position + _STEPS])
            times.append(float(np.median(steps)))
    return {"positions": list(positions), "step_seconds": seconds}


def step_seconds(session: Session, ids: np.ndarray) -> list[float]:
    """Returns the seconds of each step but the first, which binds buffers."""
    seconds = []
    for token in ids:
        began = time.perf_counter()
        session.step(np.array([token]))
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def summary(measured: Measured) -> Result:
    """Returns a point for each mark: the loss since the mark before, speeds, memory, state norms.

    `turns` is the time of a step at the last mark as a multiple of that at the first.
    """
    points = []
    for mark, results in _by_mark(measured).items():
        sums, counts = joined(results)
        seconds = sum(result["prefill_seconds"] for result in results)
        point = {
            "to": mark,
            "nll": ends(mean(sums, counts)),
            "prefill_tokens_per_second": sum(counts) / seconds,
        }
        at_mark = {key: results[-1][key] for key in ("step_seconds", "rss_bytes", "norms")}
        points.append(point | at_mark)
    figures: Result = {"start": measured[0][0]["start"], "points": points, "turns": None}
    if "turns" in measured[-1][0]:
        turns = measured[-1][1]
        first, last = map(np.array, turns["step_seconds"])
        figures["turns"] = {
            "positions": turns["positions"],
            "step_seconds": [float(np.median(first)), float(np.median(last))],
            "ratio": float(np.median(last / first)),
        }
    return figures


def differences(first: Measured, second: Measured) -> Result:
    """Returns the second model's loss minus the first's, none if they read other ids.

    `states` is their largest difference in the worst layer, relative to the layer's largest value.
    """
    texts = [[(s["ids"], s["to"]) for s, _ in side if "to" in s] for side in (first, second)]
    if texts[0] != texts[1]:
        return {"points": []}
    points = []
    second_by_mark = _by_mark(second)
    for mark, before in _by_mark(first).items():
        after = second_by_mark[mark]
        sums, counts = joined(before)
        gap = mean_difference(sums, joined(after)[0], counts)
        states = _state_distance(before[-1]["states"], after[-1]["states"])
        points.append({"to": mark, "nll": gap, "states": states})
    return {"points": points}


def _state_distance(before: Mapping[str, str], after: Mapping[str, str]) -> float | None:
    gaps = []
    for name in before.keys() & after.keys():
        a, b = (
            np.frombuffer(b64decode(side[name]), "<f4").astype(np.float64)
            for side in (before, after)
        )
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


def lost(model: Result) -> list[display.Loss]:
    losses, start = [], model["suites"][NAME]["start"]
    for gap in display.differences_of(model, NAME, "points"):
        losses.append(
            display.loss_of(f"the tokens up to {gap['to']:,}", gap["nll"], gap["to"] - start)
        )
        start = gap["to"]
    return losses


def tables(models: display.Models) -> Iterator[Table]:
    losses: list[Row] = []
    speeds: list[Row] = []
    turns: list[Row] = []
    for model in models:
        gaps = {gap["to"]: gap for gap in display.differences_of(model, NAME, "points")}
        figures = model["suites"][NAME]
        for point in figures["points"]:
            names = (model["label"], f"{point['to']:,}")
            gap = gaps.get(point["to"])
            states = gap and gap["states"]
            losses.append(
                (
                    *names,
                    f"{point['nll'][0]:.4f}",
                    display.difference_cell(gap and gap["nll"]),
                    "" if states is None else f"{states:.1e}",
                    f"{max(point['norms'].values()):.3g}" if point["norms"] else "",
                )
            )
            speeds.append(
                (
                    *names,
                    f"{point['prefill_tokens_per_second']:,.0f}",
                    f"{1000 * point['step_seconds']:.2f}",
                    "" if point["rss_bytes"] is None else amount(point["rss_bytes"]),
                )
            )
        if times := figures["turns"]:
            milliseconds = [f"{1000 * seconds:.3f}" for seconds in times["step_seconds"]]
            turns.append((model["label"], *milliseconds, f"{times['ratio']:.3f}"))
            marks = [f"ms at {position:,}" for position in times["positions"]]
    first = models[0]["label"]
    title = (
        f"Length: loss since the line above, and beside {first}; how far recurrent states are off "
        f"from those of {first}, in parts of a layer's largest value"
    )
    header: Row = ("model", "tokens", "nats", "more nats", "states off", "largest norm")
    yield Table(title, header, losses, header[1:])
    header = ("model", "tokens", "prefill tokens/s", "ms/token", "memory")
    yield Table("Length: speed and memory", header, speeds, header[1:])
    if turns:
        header = ("model", *marks, "ratio")
        yield Table("A step at both ends, timed in turns", header, turns, header[1:])


def charts(models: display.Models) -> Iterator[Chart]:
    if len(models[0]["suites"][NAME]["points"]) < 2:
        return
    points = [model["suites"][NAME]["points"] for model in models]
    summary = "By the tokens of one text that were read before, its state carried on."
    losses = [[(point["to"], point["nll"]) for point in line] for line in points]
    yield from display.loss_curves("Loss by length", summary, "tokens", models, losses, lost)
    norms = [
        [(p["to"], (max(p["norms"].values()), None, None)) for p in line if p["norms"]]
        for line in points
    ]
    yield display.curves(
        "Largest norm of a recurrent state", summary, ("tokens", "norm"), models, norms
    )
    steps = [[(p["to"], (1000 * p["step_seconds"], None, None)) for p in line] for line in points]
    yield display.curves("Time of a step", summary, ("tokens", "ms"), models, steps)
