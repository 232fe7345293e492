"""Masks and drafts: replies stay what they are, whatever is drafted and however slow a mask is."""

import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat import scheduler as scheduler_module
from rgexport.chat.counters import Counters
from rgexport.chat.jobs import GenerationRequest
from rgexport.chat.masks import MaskThreads, ReplyMask
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompt_lookup import Draft, PromptLookup
from rgexport.chat.sampling import Sampling
from rgexport.chat.scheduler import Scheduler
from rgexport.chat.speculation import Speculation
from rgexport.errors import RequestError
from tests.chat.test_scheduler import VOCAB, Heard, alone, ask, held_up
from tests.toy_session import ToySession

ALL = np.ones(VOCAB, bool)


class GatedMask:
    """Allows all tokens; waits for `gate` before the mask of token number `at`."""

    def __init__(self, at: int = 3) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        self.tokens: list[int] = []
        self._at = at

    def allowed(self) -> np.ndarray:
        if len(self.tokens) == self._at:
            self.reached.set()
            assert self.gate.wait(60)
        return ALL

    def accept(self, token: int) -> None:
        self.tokens.append(token)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drafted is tried, however long that takes."""
    monkeypatch.setattr(Speculation, "_pass_seconds", lambda self, rows, tokens, step: step)


@pytest.fixture
def make_limited(make_scheduler, monkeypatch):
    """Makes schedulers whose masks have other time limits."""

    def make(rows: int = 3, **limits: float) -> Scheduler:
        monkeypatch.setattr(scheduler_module, "MaskThreads", partial(MaskThreads, **limits))
        return make_scheduler(ToySession(VOCAB), rows)

    return make


@pytest.mark.parametrize("at", [0, 3])
def test_others_are_read_and_write_while_a_mask_is_computed(at, make_limited):
    scheduler, mask = make_limited(), GatedMask(at)
    slow = ask(scheduler, [1] * 200, 8, mask=mask)
    assert mask.reached.wait(30)
    others = [ask(scheduler, [2, i] * 150, 40) for i in range(4)]  # more than there are free rows
    for i, other in enumerate(others):
        assert other.wait().reason == "length" and other.tokens == alone([2, i] * 150, 40)
    assert len(slow.tokens) == at
    mask.gate.set()
    assert slow.wait().reason == "length" and slow.tokens == alone([1] * 200, 8)


def test_a_mask_beyond_its_time_ends_the_reply(make_limited):
    scheduler, mask = make_limited(seconds=0.05), GatedMask()
    end = ask(scheduler, [1], 8, mask=mask).wait()
    assert end.reason == "error" and "takes longer than 0.05 s for one token" in str(end.error)
    assert not mask.gate.is_set(), "nothing waits for it"
    assert ask(scheduler, [2], 5).wait().reason == "length"
    mask.gate.set()


@pytest.mark.parametrize("ending", ["cancel", "close"])
def test_a_reply_that_waits_for_its_mask_ends(ending, make_limited):
    scheduler, mask, heard = make_limited(rows=1), GatedMask(), Heard()
    job = scheduler.submit(GenerationRequest(ids=[1], listener=heard, mask=mask))
    assert mask.reached.wait(30)
    ending_it = threading.Thread(target=job.cancel if ending == "cancel" else scheduler.close)
    ending_it.start()
    assert heard.wait().reason == "cancelled"
    if ending == "cancel":
        assert ask(scheduler, [2]).wait().reason == "length"
    mask.gate.set()
    ending_it.join(30)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (RequestError("the grammar cannot go on"), "the grammar cannot go on"),
        (KeyError(5), "the mask failed: 5"),
        (np.zeros(VOCAB, bool), "the mask allows no token"),
        (ALL[1:], f"the mask is bool [{VOCAB - 1}]; expected bool [{VOCAB}]"),
        (np.ones(VOCAB), f"the mask is float64 [{VOCAB}]; expected bool"),
    ],
)
def test_an_error_of_a_mask_ends_its_reply_alone(answer, message, make_limited):
    scheduler, mask = make_limited(), Mock()
    mask.allowed.side_effect = [answer]  # returned, or raised
    with held_up(scheduler, [2], 5) as other:
        failing = ask(scheduler, [1], mask=mask)
    assert message in str(failing.wait().error)
    assert other.tokens == alone([2], 5)


def test_a_mask_that_came_too_late_is_an_error():
    threads = MaskThreads(VOCAB, lambda: None, seconds=0.0)
    with pytest.raises(RequestError, match="longer than 0 s for one token"):
        ReplyMask(GatedMask(), threads).bias(30)
    threads.close()


class Uneven(GatedMask):
    """Allows half of the tokens, the other half after each token; some masks take a while."""

    def allowed(self) -> np.ndarray:
        time.sleep(0.002 * (len(self.tokens) % 16 == 1))
        return np.arange(VOCAB) % 2 == len(self.tokens) % 2


def test_the_longest_match_wins_and_then_the_last() -> None:
    assert PromptLookup([1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3]).draft(2) == Draft([4, 5], 3)
    assert PromptLookup([2, 3, 4, 0, 2, 3, 5, 1, 6, 2, 3]).draft(1) == Draft([5], 2)
    assert PromptLookup([7, 8, 9, 1, 2], [0, 1, 2, 3]).draft(9) == Draft([3], 2)
    assert PromptLookup([1, 2, 3]).draft(4) == Draft()
    assert PromptLookup([9, 1, 2, 1, 2, 1]).draft(5) == Draft([2, 1, 2, 1, 2], 3), "it goes on so"


class Circle(ToySession):
    """It goes round twelve tokens, but stumbles at some positions; it is exact for any number."""

    info = replace(ToySession.info, exact_tokens=8)

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        positions = self.position[rows.start : rows.stop, None] + np.arange(tokens.shape[1])
        super()._take(rows, tokens, 1)
        following = (tokens + 1 + (positions % 20 == 7)) % 12
        logits: np.ndarray = 3 * np.eye(VOCAB, dtype=np.float32)[following]
        return logits[:, -num_logits:]


Replies = list[tuple[list[int], str]]  # what is written for each request, and why it ended


def replies(asked: list[dict[str, Any]], *, rows: int, lookup: bool) -> tuple[Replies, Counters]:
    scheduler = Scheduler(Circle(VOCAB), PrefixStore(1 << 20), rows=rows, lookup=lookup)
    heard = []
    for request in asked:
        fields = request | {"mask": Uneven() if request.get("mask") else None}
        heard.append(Heard(fields.pop("leaves", None)))
        scheduler.submit(GenerationRequest(listener=heard[-1], **fields))
    reasons = [listener.wait().reason for listener in heard]
    scheduler.close()
    written = [listener.tokens for listener in heard]
    return list(zip(written, reasons, strict=True)), scheduler.counters


SAMPLINGS = Sampling(), Sampling(temperature=0.9, seed=4), Sampling(repetition_penalty=1.4)
REQUEST = st.fixed_dictionaries(
    {
        "ids": st.lists(st.integers(0, 12), min_size=1, max_size=30),
        "max_new_tokens": st.integers(1, 40),
        "sampling": st.sampled_from(SAMPLINGS),
        "stop_ids": st.sampled_from([(), (5,)]),
        "draft": st.sampled_from([(), (3, 4, 5, 6, 7, 8)]),
        "leaves": st.sampled_from([None, None, 6]),
        "mask": st.booleans(),
    }
)


@settings(max_examples=60)
@given(rows=st.integers(1, 5), asked=st.lists(REQUEST, min_size=1, max_size=6))
@pytest.mark.usefixtures("eager")
def test_drafts_change_no_reply(rows: int, asked: list[dict[str, Any]]) -> None:
    """Greedy or by chance, with stops, penalties and masks, alone and with others."""
    plain, counted = replies(asked, rows=rows, lookup=False)
    assert counted.drafted_tokens == 0
    assert replies(asked, rows=rows, lookup=True)[0] == plain
    for request, (tokens, _) in zip(asked, plain, strict=True):
        assert not request["mask"] or all(token % 2 == i % 2 for i, token in enumerate(tokens))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("rows", [1, 2])
def test_drafts_save_steps(rows: int) -> None:
    # So long that it does not matter when the second one joins.
    asked = [{"ids": [1, 2, 3], "max_new_tokens": 900}] * rows
    plain, counted = replies(asked, rows=rows, lookup=False)
    with_drafts, faster = replies(asked, rows=rows, lookup=True)
    assert with_drafts == plain
    assert faster.steps < counted.steps / 2
    assert faster.accepted_tokens > 0.5 * faster.drafted_tokens


def test_nothing_is_drafted_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def proportional(self, rows, tokens, step_seconds):
        return tokens * step_seconds

    monkeypatch.setattr(Speculation, "_pass_seconds", proportional)

    asked = [{"ids": [1, 2, 3], "max_new_tokens": 120}]
    assert replies(asked, rows=1, lookup=True)[1].drafted_tokens == 0
