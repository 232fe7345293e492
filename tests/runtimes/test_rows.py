"""Conversations that come and go in the rows of one session, beside DeepMind's model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import POSITION
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import Session
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.runtimes.engines import ENGINES, EXPORTS
from tests.sessions import distance

TOLERANCE = {"onnx": 1e-4, "coreml": 2e-2, "gguf": 1e-4}
"""Of the largest logit; Core ML computes in float16."""


class Talk:
    """A conversation: its tokens, what DeepMind's model says after each, and how many it took."""

    def __init__(self, config: GriffinConfig, model: Any, chosen: np.random.Generator) -> None:
        self.tokens = chosen.integers(0, config.vocab_size, 60)
        self.logits = deepmind_logits(model, self.tokens[None])[0]
        self.taken = 0


@pytest.mark.parametrize("name", ["irregular", "hawk", "attention_tail"])
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_come_and_go(engine: str, name: str, tmp_path: Path) -> None:
    """A row that is used leaves the others alone, and takes its state to another place."""
    config = ODD_CONFIGS[name]
    artifact, weights = EXPORTS[engine](config, tmp_path)
    session, model = open_session(artifact), deepmind_model(config, weights)
    chosen = np.random.default_rng(5)
    session.reset(4)
    rows = [Talk(config, model, chosen) for _ in range(4)]
    for _ in range(30):
        first = int(chosen.integers(4))
        used = range(first, int(chosen.integers(first, 4)) + 1)
        match chosen.integers(5):
            case 0:
                _swap(session, rows, used)
            case 1:
                _begin(session, rows, used, lambda: Talk(config, model, chosen))
            case 2:
                _try(session, rows, used, chosen, TOLERANCE[engine])
            case _:
                _advance(session, rows, used, int(chosen.choice([1, 1, 3])), TOLERANCE[engine])
    assert [int(p) for p in session.position] == [talk.taken for talk in rows]
    session.close()


def _advance(session: Session, rows: list[Talk], used: range, count: int, tolerance: float) -> None:
    count = min(count, *(len(rows[i].tokens) - rows[i].taken for i in used))
    tokens = np.array([rows[i].tokens[rows[i].taken :][:count] for i in used])
    found = session.take(used, tokens, 2)[:, -1]
    for row, logits in zip(used, found, strict=True):
        rows[row].taken += count
        expected = rows[row].logits[rows[row].taken - 1]
        assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


def _try(
    session: Session,
    rows: list[Talk],
    used: range,
    chosen: np.random.Generator,
    tolerance: float,
) -> None:
    """Of three tokens, or fewer, each row keeps some: what comes after them may be wrong."""
    count = min(3, *(len(rows[i].tokens) - rows[i].taken for i in used))
    kept = chosen.integers(0, count + 1, len(used)).tolist()
    tokens = np.array([rows[i].tokens[rows[i].taken :][:count] for i in used])
    for row, keep in zip(tokens, kept, strict=True):
        row[keep:] = chosen.permutation(row[keep:])
    found = session.verify(used, tokens)
    session.accept(kept)
    for row, keep, logits in zip(used, kept, found, strict=True):
        expected = rows[row].logits[rows[row].taken :][:keep]
        rows[row].taken += keep
        assert not keep or distance(logits[:keep], expected) <= tolerance


def _swap(session: Session, rows: list[Talk], used: range) -> None:
    first, last = range(used[0], used[0] + 1), range(used[-1], used[-1] + 1)
    one, other = session.get_rows(first), session.get_rows(last)
    session.set_rows(first, other)
    session.set_rows(last, one)
    rows[used[0]], rows[used[-1]] = rows[used[-1]], rows[used[0]]


def _begin(session: Session, rows: list[Talk], used: range, make: Callable[[], Talk]) -> None:
    empty = {name: np.zeros((len(used), *s)) for name, s in session.state_shapes.items()}
    session.set_rows(used, empty | {POSITION: np.zeros(len(used), np.int64)})
    for row in used:
        rows[row] = make()
