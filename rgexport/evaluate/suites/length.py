"""The suite `length`: one long text whose state is carried on, to a million tokens and more.

A piece reads some thousand tokens and leaves its state for the next one. At marks (8K, 16K, …) the
states are looked at, steps are timed, and a state file is left: any engine, here or elsewhere, goes
on from there with `--state`.
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

from rgexport.chat.prefix_key import key_of
from rgexport.chat.state_file import (
    SavedState,
    read_state,
    read_state_header,
    require_same_model,
    write_state,
)
from rgexport.errors import RequestError
from rgexport.evaluate.figures import mean, mean_difference
from rgexport.evaluate.losses import further_losses
from rgexport.evaluate.pieces import Piece, Result, chained
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.evaluate.suites.text import LONGEST_TOKEN, documents
from rgexport.griffin.state import State
from rgexport.runtimes.memory import rss_bytes
from rgexport.runtimes.session import Session

NAME = "length"
FIRST = 1 << 13
"""Tokens up to the first mark; each of the next is twice as far."""
_PIECE = 1 << 13
_BLOCK = 1024
"""Tokens whose losses are kept as one sum."""
_STEPS = 16
"""That are timed at once."""
_TURNS = 24
_STATE = ".rg_lru"


def marks(start: int, last: int) -> list[int]:
    """Where states are looked at: 8K, 16K, … behind `start`, and the `last` token."""
    found, at = [], FIRST
    while at < last:
        found.append(at)
        at *= 2
    return [mark for mark in [*found, last] if mark > start]


def pieces(subject: Subject, request: Request) -> Iterator[Piece]:
    """A chain of pieces through the text, and one that times steps at both ends in turns.

    Raises:
        RequestError: the state file is of another model or text, or behind the end.
    """
    subject.require_tokenizer(NAME)
    text, end = _text(subject, request), request.length
    start, far = text["start"], marks(text["start"], end)
    stops = sorted({*far, *range(start + _PIECE, end, _PIECE)})
    stretches = [
        text | {"from": first, "to": stop, "mark": stop in far}
        for first, stop in zip([start, *stops], stops, strict=False)
    ]
    found = [Piece(subject.identity, NAME, work, work["to"] - work["from"]) for work in stretches]
    if subject.state_identity and len(far) > 1:
        work = text | {"turns": [far[0], far[-1]]}
        found.append(Piece(subject.identity, NAME, work, 2 * _TURNS * _STEPS))
    yield from chained(found)


@lru_cache(maxsize=1)
def _text(subject: Subject, request: Request) -> dict[str, Any]:
    """What is read, from where on, and from which state; all pieces have it."""
    ids = key_of(_ids(subject, request)[: request.length + 1])[1]
    if request.state is None:
        return {"ids": ids, "start": 0, "state": None}
    saved = _saved(subject, request)
    return {"ids": ids, "start": saved.position, "state": read_state_header(request.state).sha256}


def _saved(subject: Subject, request: Request) -> SavedState:
    assert request.state is not None
    identity = subject.state_identity
    if identity is None:
        raise RequestError(f"{subject.label} was not made by rgexport: it takes no state files")
    saved = read_state(request.state, subject.state_shapes)
    require_same_model(request.state, saved, identity)
    if saved.position >= request.length:
        raise RequestError(
            f"{request.state} has seen {saved.position} tokens; expected fewer than "
            f"{request.length}: pass a larger --length"
        )
    if saved.key != key_of(_ids(subject, request)[: saved.position]):
        raise RequestError(
            f"{request.state} has seen another text; pass the texts that it was made with (--text)"
        )
    return saved


def _ids(subject: Subject, request: Request) -> np.ndarray:
    """A bos and the texts, one behind the other, over and over: `length` tokens and more."""
    return _text_ids(subject, request.texts, request.length + 1 + _STEPS)


@lru_cache(maxsize=1)
def _text_ids(subject: Subject, texts: tuple[Path, ...], count: int) -> np.ndarray:
    longest = count * LONGEST_TOKEN
    text = "\n\n".join(document.text[:longest] for document in documents(texts))[:longest]
    ids = np.array(subject.encode(text), np.int64)
    if not len(ids):
        raise RequestError("the texts are empty")
    bos = np.array(subject.bos, np.int64)
    return np.concatenate([bos, np.resize(ids, count - len(bos))])


def measure(
    subject: Subject, session: Session, work: Mapping[str, Any], request: Request
) -> Result:
    """Losses of a stretch in sums of blocks; at a mark also norms, states and times.

    Raises:
        RequestError: the texts or the state file are not those of the piece.
    """
    if any(work[name] != value for name, value in _text(subject, request).items()):
        raise RequestError("the texts of length have changed, or a worker has others")
    ids = _ids(subject, request)
    if "turns" in work:
        return _in_turns(subject, session, work["turns"], ids, request)
    first, stop = work["from"], work["to"]
    if first == 0:
        session.reset()
    elif first == work["start"]:
        session.set_state(_saved(subject, request).state)
    began = time.perf_counter()
    each = further_losses(session, ids[first : stop + 1])
    seconds = time.perf_counter() - began
    starts = np.arange(0, len(each), _BLOCK)
    found = {
        "sums": np.add.reduceat(each, starts).tolist(),
        "counts": np.diff([*starts, len(each)]).tolist(),
        "prefill_seconds": seconds,
    }
    return found | (_at_mark(subject, session, stop, ids, request) if work["mark"] else {})


def _at_mark(
    subject: Subject, session: Session, position: int, ids: np.ndarray, request: Request
) -> Result:
    state = session.get_state()
    recurrent = {name: a[0] for name, a in state.items() if name.endswith(_STATE)}
    found = {
        "step_seconds": float(np.median(timed(session, ids[position : position + _STEPS]))),
        "rss_bytes": rss_bytes(),
        "norms": {name: float(np.linalg.norm(array)) for name, array in recurrent.items()},
        "states": {name: _packed(array) for name, array in recurrent.items()},
    }
    session.set_state(state)
    if subject.state_identity:
        key = key_of(ids[:position])
        saved = SavedState(subject.state_identity, key, state, engine=session.info.engine)
        path = state_file(subject, position, request)
        path.parent.mkdir(exist_ok=True)
        write_state(path, saved)
    return found


def state_file(subject: Subject, position: int, request: Request) -> Path:
    """Where the state after so many tokens is left: one file for each model, text and beginning."""
    of = json.dumps([subject.identity, _text(subject, request)], sort_keys=True)
    name = f"{subject.label}-{position}-{hashlib.sha256(of.encode()).hexdigest()[:8]}"
    return request.folder / "states" / f"{name}.safetensors"


def _in_turns(
    subject: Subject,
    session: Session,
    positions: Sequence[int],
    ids: np.ndarray,
    request: Request,
) -> Result:
    """Seconds of a step at two marks, [turns]: in turns, as the machine's speed varies."""
    states = [_marked(subject, position, request) for position in positions]
    seconds: list[list[float]] = [[], []]
    for _ in range(_TURNS):
        for found, position, state in zip(seconds, positions, states, strict=True):
            session.set_state(state)
            found.append(float(np.median(timed(session, ids[position : position + _STEPS]))))
    return {"positions": list(positions), "step_seconds": seconds}


def _marked(subject: Subject, position: int, request: Request) -> State:
    path = state_file(subject, position, request)
    if not path.is_file():
        raise RequestError(f"{path} is gone; pass another folder with -o")
    return read_state(path, subject.state_shapes).state


def timed(session: Session, ids: np.ndarray) -> list[float]:
    """Seconds of each step but the first, which binds buffers."""
    found = []
    for token in ids:
        began = time.perf_counter()
        session.step(np.array([token]))
        found.append(time.perf_counter() - began)
    return found[1:]


def _packed(array: np.ndarray) -> str:
    return b64encode(np.asarray(array, "<f4").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), "<f4").astype(np.float64)


def summary(found: Sequence[tuple[Mapping[str, Any], Result]]) -> Result:
    """A point for each mark: the loss since the mark before, speeds, memory, norms of states.

    `turns` is the time of a step at the last mark in times of that at the first.
    """
    points = []
    for mark, results in _by_mark(found).items():
        sums, counts = _joined(results, "sums"), _joined(results, "counts")
        nll, last = mean(sums, counts), results[-1]
        points.append(
            {
                "to": mark,
                "nll": [nll.value, nll.low, nll.high],
                "prefill_tokens_per_second": sum(counts)
                / sum(result["prefill_seconds"] for result in results),
                "step_seconds": last["step_seconds"],
                "rss_bytes": last["rss_bytes"],
                "norms": last["norms"],
            }
        )
    turns = next((result for work, result in found if "turns" in work), None)
    start = found[0][0]["start"]
    return {"start": start, "points": points, "turns": turns and _ratio(turns)}


def _ratio(turns: Result) -> Result:
    first, last = map(np.array, turns["step_seconds"])
    return {
        "positions": turns["positions"],
        "step_seconds": [float(np.median(first)), float(np.median(last))],
        "ratio": float(np.median(last / first)),
    }


def differences(
    first: Sequence[tuple[Mapping[str, Any], Result]],
    second: Sequence[tuple[Mapping[str, Any], Result]],
) -> Result:
    """What a second model's loss is above the first's, and how far its recurrent states are off.

    `states` is the largest difference in the worst layer, in parts of that layer's largest value.
    """
    if not _same_text(first, second):
        return {"points": []}
    points = []
    others = _by_mark(second)
    for mark, one in _by_mark(first).items():
        other = others[mark]
        sums = _joined(one, "sums"), _joined(other, "sums")
        gap = mean_difference(*sums, _joined(one, "counts"))
        states = _apart(one[-1]["states"], other[-1]["states"])
        points.append({"to": mark, "nll": asdict(gap), "states": states})
    return {"points": points}


def _same_text(*runs: Sequence[tuple[Mapping[str, Any], Result]]) -> bool:
    texts = [[(work["ids"], work.get("to")) for work, _ in run if "to" in work] for run in runs]
    return texts[0] == texts[1]


def _apart(one: Mapping[str, str], other: Mapping[str, str]) -> float | None:
    gaps = []
    for name in one.keys() & other.keys():
        a, b = _unpacked(one[name]), _unpacked(other[name])
        gaps.append(abs(a - b).max() / (abs(a).max() or 1.0))
    return float(max(gaps)) if gaps else None


def _by_mark(found: Sequence[tuple[Mapping[str, Any], Result]]) -> dict[int, list[Result]]:
    """The results up to each mark, from the mark before on."""
    groups: dict[int, list[Result]] = defaultdict(list)
    waiting: list[Result] = []
    for work, result in found:
        if "to" in work:
            waiting.append(result)
            if work["mark"]:
                groups[work["to"]], waiting = waiting, []
    return groups


def _joined(results: Sequence[Result], name: str) -> list[float]:
    return [value for result in results for value in result[name]]
