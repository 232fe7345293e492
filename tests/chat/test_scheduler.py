"""Continuous batching over a toy engine: who hears what, and whose turn it is."""

import itertools
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.admission import Admission
from rgexport.chat.jobs import KEPT_EVERY, Busy, GenerationJob, GenerationRequest
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.scheduler import Scheduler
from rgexport.errors import RequestError
from tests.chat.conftest import until
from tests.toy_session import ToySession

VOCAB = 50


class Heard:
    """A listener that remembers; it may hold the scheduler up, or have enough."""

    def __init__(self, most=None, then=None):
        self.tokens = []
        self.end_ = None
        self._most, self._then, self._ended = most, then, threading.Event()

    def token(self, token, logits):
        self.tokens.append(token)
        if self._then:
            self._then()
        return self._most is None or len(self.tokens) < self._most

    def end(self, end):
        assert self.end_ is None, "it ends once"
        self.end_ = end
        self._ended.set()

    def wait(self):
        assert self._ended.wait(30)
        assert self.end_
        return self.end_


def alone(ids, count):
    """What the toy says greedily."""
    session, tokens = ToySession(VOCAB), list[int]()
    logits = session.prefill(np.array([ids]))[0, -1]
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = session.step(np.array(tokens[-1:]))[0]
    return tokens


@pytest.fixture
def session():
    return ToySession(VOCAB)


@pytest.fixture
def scheduler(make_scheduler, session):
    return make_scheduler(session)


def ask(scheduler, ids, count=5, **options):
    heard = options.pop("listener", None) or Heard()
    scheduler.submit(GenerationRequest(ids=ids, listener=heard, max_new_tokens=count, **options))
    return heard


@contextmanager
def held_up(scheduler, ids, count=2, **more):
    """Holds the scheduler up by a reply, for as long as the block runs; then the reply goes on."""
    gate = threading.Event()
    heard = ask(scheduler, ids, count, listener=Heard(then=lambda: gate.wait(30)), **more)
    yield heard
    gate.set()
    assert heard.wait().reason == "length"


PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=90)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 4),
    asked=st.lists(st.tuples(PROMPTS, st.integers(1, 9), st.booleans()), min_size=1, max_size=9),
)
def test_all_hear_what_they_would_hear_alone(rows, asked):
    """Also with prompts that begin alike, and with some that leave after two tokens."""
    scheduler, heard = Scheduler(ToySession(VOCAB), PrefixStore(1 << 20), rows=rows), list[Heard]()
    for ids, count, leaves in asked:
        heard.append(ask(scheduler, ids, count, listener=Heard(most=2 if leaves else None)))
    for (ids, count, leaves), listener in zip(asked, heard, strict=True):
        reason = "stop" if leaves and count >= 2 else "length"
        assert listener.wait().reason == reason
        assert listener.tokens == alone(ids, min(count, 2) if leaves else count)
    scheduler.close()


@pytest.mark.parametrize(
    ("ids", "draft", "message"),
    [
        ([], [], "the prompt is empty"),
        ([VOCAB], [], "no token id 50: the model has 50 tokens; expected ids from 0"),
        ([1], [1, -1], "no token id -1"),
        ([1, 2**70], [], f"no token id {2**70}"),
    ],
)
def test_tokens_that_cannot_be_read(ids, draft, message, scheduler):
    with pytest.raises(RequestError, match=message):
        ask(scheduler, ids, draft=draft)


def test_rows_share_each_step(make_scheduler, session):
    scheduler = make_scheduler(session, cache_bytes=0)
    with held_up(scheduler, [1], 20):
        others = [ask(scheduler, [2 + i], 20) for i in range(3)]
    for heard in others:
        heard.wait()
    assert max(rows for rows, _ in session.calls) == 3
    assert sum(rows for rows, tokens in session.calls if tokens == 1) == 4 * 20
    assert scheduler.counters.steps < 4 * 19


def test_a_prompt_is_read_between_the_steps_of_others(scheduler, session):
    with held_up(scheduler, [1], 400):
        reader = ask(scheduler, [2] * 3000, 1)
    reader.wait()
    chunks = [number for number, (_, tokens) in enumerate(session.calls) if tokens > 1]
    assert len(chunks) > 3
    assert all(after - before > 1 for before, after in itertools.pairwise(chunks))


def test_long_prompts_are_kept_in_steps(scheduler):
    prompt = [i % 7 for i in range(2 * KEPT_EVERY + 100)]
    ask(scheduler, prompt, 1, keep=[77]).wait()
    for shared, known in ((80, 77), (KEPT_EVERY + 9, KEPT_EVERY), (2 * KEPT_EVERY + 50, 1024)):
        branch = ask(scheduler, [*prompt[:shared], 9, 9], 1)
        assert branch.wait().cached_tokens == known
        assert branch.tokens == alone([*prompt[:shared], 9, 9], 1)


def test_logits_that_are_no_numbers_end_one_reply(scheduler, session, monkeypatch):
    take = session._take

    def spoilt(rows, tokens, num_logits):
        logits = take(rows, tokens, num_logits)
        logits[tokens[:, -1] == 33] = np.nan
        return logits

    monkeypatch.setattr(session, "_take", spoilt)
    bad, good = ask(scheduler, [1, 33]), ask(scheduler, [1, 2])
    assert "NaN or infinite" in str(bad.wait().error)
    assert good.wait().reason == "length"


def job(client="", **options):
    return GenerationJob(GenerationRequest(ids=[1], listener=Heard(), client=client, **options))


def added(admission, *jobs):
    for each in jobs:
        assert admission.add(each) is None
    return [*jobs]


def test_the_client_with_the_fewest_rows_goes_first():
    admission = Admission(4, 9)
    _, b, c, settling = added(admission, job("a"), job("b"), job("c"), job("b", first=True))
    running = {"a": 3, "b": 1, "c": 1}
    taken = [admission.take(running) for _ in range(3)]
    assert taken == [settling, c, b], "equal ones take turns"
    assert admission.take(running, most=2) is None, "it has more"


def test_a_cancelled_job_frees_its_place_at_once():
    """The scheduler has no part in it: it may be in the middle of a long chunk."""
    admission = Admission(1, 1)
    running, waiting = added(admission, job(), job())
    assert admission.take({}) is running
    with pytest.raises(Busy):
        admission.add(job())
    waiting.cancel()
    assert admission.waiting == 0
    added(admission, job())
    running.cancel()
    added(admission, job())
    assert admission.take_cancelled() == [waiting], "the scheduler has the running one"


def test_a_full_queue_has_room_for_who_has_less_in_it():
    admission = Admission(1, 2)
    many = added(admission, *(job("a") for _ in range(3)))
    assert admission.add(job("b")) is many[-1], "the newest one of the other client"
    with pytest.raises(Busy, match="2 requests wait already"):
        admission.add(job("b"))
    assert next(admission.take({}) for _ in range(2)) is many[0]


def test_one_client_does_not_hold_all_rows(make_scheduler, session):
    """Its replies are paused for those of others, and say what they say alone."""
    scheduler, ended = make_scheduler(session, rows=4, cache_bytes=0), list[str]()

    def asked(client, ids, count):
        heard = Heard(then=lambda: len(heard.tokens) == count and ended.append(client))
        return ask(scheduler, ids, count, client=client, listener=heard)

    many = [asked("a", [1, i], 60) for i in range(3)]
    with held_up(scheduler, [1, 3], 60, client="a") as fourth:
        many += [fourth, *(asked("a", [1, i], 60) for i in range(4, 40))]
        until(lambda: fourth.tokens)
        others, before = [asked(client, [2], 5) for client in "bcd"], len(ended)
    for heard in (*others, *many):
        heard.wait()
    assert {*ended[before : before + 3]} == {*"bcd"}, "although the other client had all rows"
    assert all(heard.tokens == alone([1, i], 60) for i, heard in enumerate(many))
    assert all(heard.tokens == alone([2], 5) for heard in others)
    assert scheduler.counters.requests == 43, "a paused reply is no new request"


def test_clients_read_their_prompts_by_turns(make_scheduler, session):
    scheduler, order = make_scheduler(session, cache_bytes=0), list[str]()

    def asked(client, ids):
        listener = Heard(then=lambda: order.append(client))
        return ask(scheduler, ids, 1, client=client, listener=listener)

    with held_up(scheduler, [1]):
        heard = [asked("a", [2] * 9000), asked("a", [3] * 9000), asked("b", [4] * 50)]
    for each in heard:
        each.wait()
    assert order == ["b", "a", "a"]


def test_an_error_while_a_row_is_freed_loses_no_job(make_scheduler, session, monkeypatch):
    scheduler, gate = make_scheduler(session, rows=2, cache_bytes=0), threading.Event()
    heard = [ask(scheduler, [i], 10**6, client="a") for i in range(2)]
    heard.append(ask(scheduler, [2], 10**6, client="a", listener=Heard(then=gate.set)))
    until(lambda: heard[0].tokens and heard[1].tokens)

    def broken(rows):
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(session, "get_rows", broken)
    other = ask(scheduler, [3], 2, client="b")
    assert "the engine: no memory" in str(heard[0].wait().error)
    assert other.wait().reason == "length", "it has its turn after the error"
    assert gate.wait(30)
    scheduler.close()
    assert heard[2].wait().reason == "cancelled"


def test_a_listener_that_raises_ends_its_own_reply(scheduler):
    with held_up(scheduler, [5], 20) as other:
        failing = ask(scheduler, [6], 4, listener=Heard(then=lambda: 1 / 0))
    assert len(other.tokens) == 20 and scheduler.running == 0
    assert failing.wait().reason == "error" and "division" in str(failing.wait().error)
