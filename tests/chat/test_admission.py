"""Whose turn it is: a client that asks for much leaves room for the others."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from rgexport.chat.admission import Admission
from rgexport.chat.jobs import Busy, End, Job, Request
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.scheduler import Scheduler
from tests.chat.test_scheduler import VOCAB, Heard, alone, ask
from tests.toy_session import ToySession


def job(client: str = "", **options: Any) -> Job:
    return Job(Request(ids=[1], listener=Heard(), client=client, **options))


def added(admission: Admission, *jobs: Job) -> list[Job]:
    for each in jobs:
        assert admission.add(each) is None
    return [*jobs]


def test_the_client_with_the_fewest_rows_goes_first() -> None:
    admission = Admission(4, 9)
    _, b, c = added(admission, job("a"), job("b"), job("c"))
    running = {"a": 3, "b": 1, "c": 1}
    assert admission.take(running) is b and admission.take(running) is c, "equal ones take turns"
    assert admission.take(running, most=2) is None, "it has more"


def test_a_reading_that_goes_first_does_so_among_those_of_its_client() -> None:
    admission = Admission(2, 9)
    others = added(admission, job("a"), job("b"))
    (settling,) = added(admission, job("b", first=True))
    assert [admission.take({}) for _ in range(3)] == [others[0], settling, others[1]]


def test_readings_that_go_first_are_bounded_and_take_no_place_of_others() -> None:
    admission = Admission(2, 0)
    added(admission, *(job(first=True) for _ in range(2)), *(job() for _ in range(2)))
    for first in (True, False):
        with pytest.raises(Busy, match="0 requests wait already"):
            admission.add(job(first=first))


def test_a_cancelled_job_frees_its_place_at_once() -> None:
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


def test_a_full_queue_has_room_for_who_has_less_in_it() -> None:
    admission = Admission(1, 2)
    many = added(admission, *(job("a") for _ in range(3)))
    assert admission.add(job("b")) is many[-1], "the newest one of the other client"
    with pytest.raises(Busy, match="2 requests wait already"):
        admission.add(job("b"))
    assert next(admission.take({}) for _ in range(2)) is many[0]


@pytest.fixture
def session() -> ToySession:
    return ToySession(VOCAB)


def heard_in(order: list[str], name: str) -> Callable[[], None]:
    """A listener's reaction: notes the first token."""
    return lambda: order.append(name) if name not in order else None


def test_one_client_does_not_hold_all_rows(session: ToySession) -> None:
    """Its replies are paused for those of others, and say what they say alone."""
    scheduler, gate = Scheduler(session, PrefixStore(0), rows=4), threading.Event()
    ended: list[str] = []

    class Ending(Heard):
        def __init__(self, client: str, then: Callable[[], Any] | None = None) -> None:
            super().__init__(then=then)
            self._client = client

        def end(self, end: End) -> None:
            ended.append(self._client)
            super().end(end)

    many = [
        ask(scheduler, [1, i % 49], 60, client="a", listener=Ending("a", holds))
        for i in range(64)
        for holds in [(lambda: gate.wait(30)) if i == 3 else None]
    ]
    while not many[3].tokens:
        time.sleep(0.001)
    others = [
        ask(scheduler, [2, i], 5, client=client, listener=Ending(client))
        for i, client in enumerate("bcd")
    ]
    before = len(ended)
    gate.set()
    for heard in (*others, *many):
        heard.wait()
    assert {*ended[before : before + 3]} == {*"bcd"}, "although the other client had all rows"
    assert all(heard.tokens == alone([1, i % 49], 60) for i, heard in enumerate(many))
    assert [heard.tokens for heard in others] == [alone([2, i], 5) for i in range(3)]
    assert scheduler.counters.requests == 67, "a paused reply is no new request"
    scheduler.close()


def test_a_paused_reply_that_is_left_keeps_its_state(session: ToySession) -> None:
    store, gate = PrefixStore(1 << 20), threading.Event()
    scheduler, jobs = Scheduler(session, store, rows=2), list[Job]()
    heard = [Heard(), Heard(then=lambda: gate.wait(30))]
    for i, listener in enumerate(heard):
        request = Request(ids=[1, i], listener=listener, max_new_tokens=10**6, client="a")
        jobs.append(scheduler.submit(request))
    while not heard[1].tokens:
        time.sleep(0.001)
    other = Heard(then=jobs[1].cancel)
    ask(scheduler, [3], 9, client="b", listener=other)
    gate.set()
    other.wait()
    assert heard[1].wait().reason == "cancelled"
    jobs[0].cancel()
    heard[0].wait()
    written = [1, 1, *heard[1].tokens]
    assert store.length([*written, 0]) == len(written) - 1, "the last token was never fed"
    assert heard[1].tokens == alone([1, 1], len(heard[1].tokens))
    scheduler.close()


def test_clients_read_their_prompts_by_turns(session: ToySession) -> None:
    scheduler, gate = Scheduler(session, PrefixStore(0), rows=3), threading.Event()
    order: list[str] = []
    blocker = ask(scheduler, [1], 2, listener=Heard(then=lambda: gate.wait(30)))
    long = [
        ask(scheduler, [2 + i] * 9000, 1, client="a", listener=Heard(then=heard_in(order, "a")))
        for i in range(2)
    ]
    short = ask(scheduler, [4] * 50, 1, client="b", listener=Heard(then=heard_in(order, "b")))
    gate.set()
    for heard in (blocker, *long, short):
        heard.wait()
    assert order == ["b", "a"]
    scheduler.close()


def test_prefixes_are_those_of_a_namespace(session: ToySession) -> None:
    scheduler = Scheduler(session, PrefixStore(1 << 20), rows=2)
    ids = [i % 7 for i in range(100)]
    for namespace in ("one", "two", ""):
        first = ask(scheduler, ids, 3, namespace=namespace)
        assert first.wait().cached_tokens == 0, "nothing tells that another one has sent it"
        assert ask(scheduler, ids, 3, namespace=namespace).wait().cached_tokens == 100
    assert session.fed >= 300
    scheduler.close()


def test_nobody_waits_for_the_prompt_of_another_namespace(session: ToySession) -> None:
    scheduler, gate = Scheduler(session, PrefixStore(1 << 20), rows=3), threading.Event()
    blocker = ask(scheduler, [49], 2, listener=Heard(then=lambda: gate.wait(30)))
    ids = [i % 5 for i in range(3000)]
    heard = [ask(scheduler, ids, 1, namespace=name, client=name) for name in ("one", "two")]
    gate.set()
    assert [each.wait().cached_tokens for each in heard] == [0, 0]
    blocker.wait()
    scheduler.close()


def test_an_error_while_a_row_is_freed_loses_no_job(session, monkeypatch):
    scheduler, gate = Scheduler(session, PrefixStore(0), rows=2), threading.Event()
    heard = [ask(scheduler, [i], 10**6, client="a") for i in range(2)]
    heard.append(ask(scheduler, [2], 10**6, client="a", listener=Heard(then=gate.set)))
    while not (heard[0].tokens and heard[1].tokens):
        time.sleep(0.001)

    def broken(rows: range) -> Any:
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(session, "get_rows", broken)
    other = ask(scheduler, [3], 2, client="b")
    assert "the engine: no memory" in str(heard[0].wait().error)
    assert other.wait().reason == "length", "it has its turn after the error"
    assert gate.wait(30)
    scheduler.close()
    assert heard[2].wait().reason == "cancelled"
