"""Masks that are slow, fail or never come: they concern their own reply alone."""

import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from rgexport.chat import scheduler as scheduler_module
from rgexport.chat.jobs import Request
from rgexport.chat.masks import MaskThreads, ReplyMask
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.scheduler import Scheduler
from rgexport.chat.speculation import Speculation
from rgexport.errors import RequestError
from tests.chat.test_scheduler import VOCAB, Heard, alone, ask
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
def make_scheduler(monkeypatch):
    """Makes schedulers whose masks have other time limits; closes them at the end."""
    schedulers: list[Scheduler] = []

    def make(rows: int = 3, **limits: float) -> Scheduler:
        monkeypatch.setattr(scheduler_module, "MaskThreads", partial(MaskThreads, **limits))
        schedulers.append(Scheduler(ToySession(VOCAB), PrefixStore(1 << 20), rows=rows))
        return schedulers[-1]

    yield make
    for each in schedulers:
        each.close()


def test_others_write_while_a_mask_is_computed(make_scheduler):
    scheduler, mask = make_scheduler(), GatedMask()
    slow = ask(scheduler, [1], 8, mask=mask)
    assert mask.reached.wait(30)
    others = [ask(scheduler, [2, i], 40) for i in range(4)]  # more than there are free rows
    for i, other in enumerate(others):
        assert other.wait().reason == "length" and other.tokens == alone([2, i], 40)
    assert len(slow.tokens) == 3
    mask.gate.set()
    assert slow.wait().reason == "length" and slow.tokens == alone([1], 8)


def test_a_prompt_is_read_while_a_mask_is_computed(make_scheduler):
    """The first mask is not there when the prompt ends; the row is held before its first token."""
    scheduler, mask = make_scheduler(), GatedMask(at=0)
    slow = ask(scheduler, [1] * 200, 4, mask=mask)
    prompt = [3] * 300
    assert ask(scheduler, prompt, 9).wait().reason == "length"
    mask.gate.set()
    assert slow.wait().reason == "length" and slow.tokens == alone([1] * 200, 4)


def test_a_mask_beyond_its_time_ends_the_reply(make_scheduler):
    scheduler, mask = make_scheduler(seconds=0.05), GatedMask()
    end = ask(scheduler, [1], 8, mask=mask).wait()
    assert end.reason == "error" and "takes longer than 0.05 s for one token" in str(end.error)
    assert not mask.gate.is_set(), "nothing waits for it"
    assert ask(scheduler, [2], 5).wait().reason == "length"
    mask.gate.set()


def test_a_slow_grammar_waits_behind_slow_ones_alone(make_scheduler):
    scheduler, slow = make_scheduler(quick_seconds=0.0), GatedMask(at=1)
    first = ask(scheduler, [1], 4, mask=slow)
    assert slow.reached.wait(30), "its first mask took more than no time"
    quick = ask(scheduler, [2], 1, mask=GatedMask(at=99))
    assert quick.wait().reason == "length" and quick.tokens == alone([2], 1)
    slow.gate.set()
    assert first.wait().reason == "length"


@pytest.mark.parametrize("ending", ["cancel", "close"])
def test_a_reply_that_waits_for_its_mask_ends(ending, make_scheduler):
    scheduler, mask, heard = make_scheduler(rows=1), GatedMask(), Heard()
    job = scheduler.submit(Request(ids=[1], listener=heard, mask=mask))
    assert mask.reached.wait(30)
    if ending == "cancel":
        job.cancel()
        assert heard.wait().reason == "cancelled"
        assert ask(scheduler, [2]).wait().reason == "length"
        mask.gate.set()
    else:
        closing = threading.Thread(target=scheduler.close)
        closing.start()
        assert heard.wait().reason == "cancelled"
        mask.gate.set()
        closing.join(30)


class Failing:
    """A mask that answers with `answer`, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def allowed(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


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
def test_an_error_of_a_mask_ends_its_reply_alone(answer, message, make_scheduler):
    scheduler, gate = make_scheduler(), threading.Event()
    other = ask(scheduler, [2], 5, listener=Heard(then=lambda: gate.wait(30)))
    end = ask(scheduler, [1], mask=Failing(answer))
    gate.set()
    assert message in str(end.wait().error)
    assert other.wait().reason == "length" and other.tokens == alone([2], 5)


def test_a_mask_that_waited_too_long_for_others_ends_the_reply(monkeypatch):
    monkeypatch.setattr("rgexport.chat.masks._QUEUE_SECONDS", 0.05)
    threads, first = MaskThreads(VOCAB, lambda: None, seconds=60), GatedMask(at=0)
    ReplyMask(first, threads)
    assert first.reached.wait(30)
    waiting = ReplyMask(GatedMask(), threads)
    time.sleep(0.1)
    with pytest.raises(RequestError, match=r"waited longer than 0.05 s for others"):
        waiting.bias(0)
    first.gate.set()
    threads.close()


def test_a_mask_that_came_too_late_is_an_error():
    threads = MaskThreads(VOCAB, lambda: None, seconds=0.0)
    with pytest.raises(RequestError, match="longer than 0 s for one token"):
        ReplyMask(GatedMask(), threads).bias(30)
    threads.close()


class Uneven:
    """Allows half of the tokens, another half after each token; some masks take a while."""

    def __init__(self) -> None:
        self.last = 0

    def allowed(self) -> np.ndarray:
        time.sleep(0.002 * (self.last % 3 == 1))
        return (np.arange(VOCAB) + self.last) % 2 == 0

    def accept(self, token: int) -> None:
        self.last = token


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_and_company_change_no_masked_reply(rows, monkeypatch):
    """Rows are held in the middle of a draft, and join the step again."""
    monkeypatch.setattr(Speculation, "_time", lambda self, rows, tokens, step: step)

    def replies(rows: int, lookup: bool) -> list[list[int]]:
        session = ToySession(VOCAB)
        session.info = replace(session.info, exact_tokens=16)
        scheduler = Scheduler(session, PrefixStore(0), rows=rows, lookup=lookup)
        heard = [ask(scheduler, [1, i], 60, mask=Uneven() if i % 3 else None) for i in range(6)]
        for each in heard:
            assert each.wait().reason == "length"
        scheduler.close()
        assert lookup == (scheduler.counters.accepted_tokens > 0)
        return [each.tokens for each in heard]

    assert replies(rows, lookup=True) == replies(1, lookup=False)
