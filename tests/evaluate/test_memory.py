"""The suite `memory` on sessions of which is known what they remember."""

from dataclasses import dataclass

import numpy as np
import pytest

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.evaluate.request import Request
from rgexport.evaluate.suites import memory
from rgexport.evaluate.suites.episodes import TASKS, words_of
from rgexport.evaluate.tables import memory_tables
from rgexport.griffin.checkpoint import demo_folder

VOCAB, GOLDEN = 400, (5**0.5 - 1) / 2


@dataclass(frozen=True)
class NoWords:
    """A subject without a tokenizer."""

    tokenizer = None
    bos = ()


class Remembering:
    """Continues as after the last time that it saw these two tokens, or else this one.

    It sees the last `window` tokens. What it has seen at first is forgotten after a time of its own
    in each row, `lifetime` tokens in the mean; the times are spread as an exponential distribution
    is. Where it knows nothing, it guesses.
    """

    vocab_size = VOCAB

    def __init__(self, window: int = 1 << 40, lifetime: float | None = None) -> None:
        self._window, self._lifetime = window, lifetime
        self._random, self._rows = np.random.default_rng(7), 0

    def reset(self, batch: int) -> None:
        self._seen: list[list[int]] = [[] for _ in range(batch)]
        shares = GOLDEN * np.arange(self._rows, self._rows + batch) % 1  # evenly spread
        self._rows += batch
        self._ends = (
            -np.log1p(-shares) * self._lifetime if self._lifetime else np.full(batch, np.inf)
        )

    def get_state(self) -> list[list[int]]:
        return [row.copy() for row in self._seen]

    def set_state(self, state: list[list[int]]) -> None:
        self._seen = [row.copy() for row in state]

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        logits = self._random.random((len(tokens), 1, VOCAB))
        for row, (seen, new) in enumerate(zip(self._seen, tokens.tolist(), strict=True)):
            first = not seen
            seen += new
            if first:
                self._ends[row] += len(new)
            if len(seen) > self._ends[row]:
                continue
            known = seen[-self._window :]
            if (token := _after(known)) is not None:
                logits[row, 0, token] = 2
        return logits


def _after(known: list[int]) -> int | None:
    for length in (2, 1):
        last = known[-length:]
        for i in range(len(known) - length - 1, -1, -1):
            if known[i : i + length] == last:
                return known[i + length]
    return None


def curves(session, tasks=("induction", "recall", "copying"), trials=64, farthest=4096):
    far = memory.distances(farthest)
    found = []
    for task in tasks:
        for first in range(0, trials, memory.ROWS):
            work = {"task": task, "first": first, "rows": memory.ROWS, "distances": far, "seed": 3}
            work |= {"from": 0, "to": far[-1]}
            found.append((work, memory.measure(NoWords(), session, work, Request())))
    return {entry["task"]: entry for entry in memory.summary(found)["tasks"]}


def test_what_remembers_all_is_always_right():
    for curve in curves(Remembering()).values():
        assert {point["value"] for point in curve["points"]} == {1.0}
        assert curve["half"] is None


def test_a_window_ends_where_it_ends():
    """From the key on, what was told must be in the window: value, end, filler, key and mark."""
    for curve in curves(Remembering(window=300), ["induction"]).values():
        by_distance = {point["distance"]: point for point in curve["points"]}
        assert {d for d, p in by_distance.items() if p["value"] == 1} == {16, 32, 64, 128, 256}
        beyond = [by_distance[distance]["value"] for distance in (512, 1024, 2048, 4096)]
        assert np.mean(beyond) == pytest.approx(curve["chance"], abs=0.07)
        assert 256 < curve["half"] < 512


def test_forgetting_at_a_rate_is_an_exponential():
    lifetime = 700.0
    curve = curves(Remembering(lifetime=lifetime), ["induction"], trials=256)["induction"]
    chance = curve["chance"]
    for point in curve["points"]:
        expected = chance + (1 - chance) * np.exp(-point["distance"] / lifetime)
        assert point["low"] <= expected <= point["high"], point
    assert curve["half"] == pytest.approx(lifetime * np.log(2), rel=0.3)


def test_guesses_are_at_chance():
    for curve in curves(Remembering(lifetime=1e-9), trials=128).values():
        inside = [p["low"] <= curve["chance"] <= p["high"] for p in curve["points"]]
        assert np.mean(inside) > 0.7
        assert curve["half"] is None


def test_the_state_of_a_distance_is_not_that_of_the_questions_before():
    """Answers that are heard at 256 would lie in this window at 1,024, what was told does not."""
    session = Remembering(window=900)
    curve = curves(session, ["copying"], farthest=1024)["copying"]
    first, last = curve["points"][0], curve["points"][-1]
    assert first["value"] == 1 and last["low"] <= curve["chance"] <= last["high"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("vocab", [40, 400, 256_000])
def test_episodes_of_a_task_share_a_batch(task, vocab):
    words = words_of(None, vocab)
    made = [TASKS[task](words, np.random.default_rng(seed)) for seed in range(50)]
    assert len({len(episode.told) for episode in made}) == 1
    assert len({tuple(len(q.asked) for q in episode.questions) for episode in made}) == 1
    for episode in made:
        for question in episode.questions:
            assert question.answer in question.candidates
            assert len(set(question.candidates)) == len(question.candidates) >= 2
            assert max(question.candidates) < vocab


def test_filler_has_no_symbol():
    words = words_of(None, VOCAB)
    own = {*words.symbols, *words.digits, *words.between, *words.end, *words.passkey, *words.copy}
    assert not own & set(words.filler.tolist())


def test_filler_of_words_has_none_of_them():
    tokenizer = load_tokenizer(demo_folder())
    words = words_of(tokenizer, 8192)
    assert len(words.symbols) > 60 and len(words.filler) > 1000
    assert not {*words.symbols, *words.digits, *words.between} & {*words.filler.tolist()}


def test_a_vocabulary_may_be_too_small():
    with pytest.raises(RequestError, match="a vocabulary of 20 is too small"):
        words_of(None, 20)


def test_a_table_shows_every_other_one_of_many_distances():
    def header(count):
        points = [
            {"distance": distance, "value": 1.0, "low": 0.9, "high": 1.0}
            for distance in memory.distances(16 << count - 1)
        ]
        entry = {"task": "recall", "chance": 0.25, "half": None, "points": points}
        model = {"label": "m", "suites": {"memory": {"tasks": [entry]}}}
        (table,) = memory_tables([model])
        assert all(len(row) == len(table.header) for row in table.rows)
        return table.header[1:-1]

    assert header(2) == ("16", "32") and len(header(10)) == 10
    assert header(11) == ("16", "64", "256", "1,024", "4,096", "16,384")
    assert header(12) == ("32", "128", "512", "2,048", "8,192", "32,768")


def test_distances():
    assert memory.distances(memory.farthest(500)) == [16, 32, 64, 128, 256, 512, 1024, 2000]
    assert memory.distances(64) == [16, 32, 64]
    assert memory.farthest(8) == 64
