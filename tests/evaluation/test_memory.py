"""The suite `memory`, on sessions with a known memory; confidence intervals."""

from types import SimpleNamespace

import numpy as np
import pytest

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.evaluation.figures import mean, mean_difference, share
from rgexport.evaluation.pieces import EvaluationRequest
from rgexport.evaluation.suites import memory
from rgexport.evaluation.suites.episodes import TASKS, vocabulary_of
from rgexport.griffin.checkpoint import demo_folder

VOCAB, GOLDEN = 400, (5**0.5 - 1) / 2
NO_WORDS = SimpleNamespace(tokenizer=None, bos=())  # a subject without a tokenizer


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
            if not seen:
                self._ends[row] += len(new)
            seen += new
            known = seen[-self._window :] if len(seen) <= self._ends[row] else []
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
    far = memory.doublings(16, farthest)
    results = []
    for task in tasks:
        for first in range(0, trials, memory.ROWS):
            work = {"task": task, "first": first, "rows": memory.ROWS, "distances": far, "seed": 3}
            work |= {"from": 0, "to": far[-1]}
            results.append((work, memory.measure(NO_WORDS, session, work, EvaluationRequest())))
    return {entry["task"]: entry for entry in memory.summary(results)["tasks"]}


def test_what_remembers_all_is_always_right():
    for curve in curves(Remembering(), farthest=1024).values():
        assert {point["value"] for point in curve["points"]} == {1.0}
        assert curve["half"] is None


def test_a_window_ends_where_it_ends():
    """From the key on, what was told must be in the window: value, end, filler, key and mark."""
    curve = curves(Remembering(window=300), ["induction"])["induction"]
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


def test_the_state_of_a_distance_is_not_that_of_the_questions_before():
    """Answers that are heard at 256 would lie in this window at 1,024, what was told does not."""
    curve = curves(Remembering(window=900), ["copying"], farthest=1024)["copying"]
    first, last = curve["points"][0], curve["points"][-1]
    assert first["value"] == 1 and last["low"] <= curve["chance"] <= last["high"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("vocab", [40, 400, 256_000])
def test_episodes_of_a_task_share_a_batch(task, vocab):
    words = vocabulary_of(None, vocab)
    episodes = [TASKS[task](words, np.random.default_rng(seed)) for seed in range(50)]
    assert len({len(episode.facts) for episode in episodes}) == 1
    assert len({tuple(len(q.prompt) for q in episode.questions) for episode in episodes}) == 1
    for question in (question for episode in episodes for question in episode.questions):
        assert question.answer in question.candidates and max(question.candidates) < vocab
        assert len(set(question.candidates)) == len(question.candidates) >= 2


def test_filler_has_no_symbol():
    words = vocabulary_of(load_tokenizer(demo_folder()), 8192)
    assert len(words.symbols) > 60 and len(words.filler) > 1000
    assert not {*words.symbols, *words.digits, *words.between} & {*words.filler.tolist()}
    with pytest.raises(RequestError, match="a vocabulary of 20 is too small"):
        vocabulary_of(None, 20)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(right, count, low, high):
    """The last one is the example of Newcombe, Statistics in Medicine 17, 1998."""
    interval = share(right, count)
    assert (interval["low"], interval["high"]) == pytest.approx((low, high), abs=1e-4)
    assert interval["value"] == right / count


@pytest.mark.parametrize("clusters", [2, 4, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(clusters):
    """Clusters whose tokens have an error in common, as neighbours in a text do."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        counts = rng.integers(40, 64, clusters)
        errors = rng.normal(0, 0.5, clusters)
        sums = counts * (2 + errors) + [rng.normal(0, 1, count).sum() for count in counts]
        interval = mean(sums, counts)
        held += interval["low"] <= 2 <= interval["high"]
    assert 0.91 <= held / 400 <= 0.98


def test_differences_are_of_pairs():
    """What two models find hard alike is not in their difference."""
    rng = np.random.default_rng(2)
    first = rng.normal(100, 50, 200)
    gap = mean_difference(first, first + rng.normal(0.6, 1, 200), [10] * 200)
    assert gap["low"] < 0.06 < gap["high"] < gap["low"] + 0.04
    assert gap["p"] == pytest.approx(1e-4)
    same = mean_difference(first, first, [10] * 200)
    assert same == {"value": 0, "low": 0, "high": 0, "p": 1}
    single = mean([12.0], [4])
    assert single == {"value": 3, "low": None, "high": None, "count": 4}
    assert mean_difference([1.0], [2.0], [4])["p"] is None
