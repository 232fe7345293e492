"""Continuous batching over a toy engine: whoever shares a batch hears what it would hear alone."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.jobs import KEPT_EVERY, End, Request, Token
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.sampling import Sampling
from rgexport.chat.scheduler import Scheduler
from rgexport.errors import RequestError
from tests.toy_session import ToySession

VOCAB = 50


class Heard:
    """A listener that remembers; it may hold the scheduler up, or have enough."""

    def __init__(self, most: int | None = None, then: Callable[[], Any] | None = None) -> None:
        self.tokens: list[int] = []
        self.logits: list[np.ndarray] = []
        self.end_: End | None = None
        self._most, self._then, self._ended = most, then, threading.Event()

    def token(self, token: Token) -> bool:
        self.tokens.append(token.id)
        self.logits.append(token.logits)
        if self._then:
            self._then()
        return self._most is None or len(self.tokens) < self._most

    def end(self, end: End) -> None:
        assert self.end_ is None, "it ends once"
        self.end_ = end
        self._ended.set()

    def wait(self) -> End:
        assert self._ended.wait(30)
        assert self.end_
        return self.end_


def alone(ids: list[int], count: int) -> list[int]:
    """What the toy says greedily."""
    session, found = ToySession(VOCAB), list[int]()
    logits = session.prefill(np.array([ids]))[0, -1]
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = session.step(np.array(found[-1:]))[0]
    return found


@pytest.fixture
def session() -> ToySession:
    return ToySession(VOCAB)


@pytest.fixture
def scheduler(session: ToySession) -> Iterator[Scheduler]:
    made = Scheduler(session, PrefixStore(1 << 20), rows=3)
    yield made
    made.close()


def ask(scheduler: Scheduler, ids: list[int], count: int = 5, **options: Any) -> Heard:
    heard = options.pop("listener", None) or Heard()
    scheduler.submit(Request(ids=ids, listener=heard, max_new_tokens=count, **options))
    return heard


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 4),
    asked=st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=90),
            st.integers(1, 9),
            st.booleans(),
        ),
        min_size=1,
        max_size=9,
    ),
)
def test_all_hear_what_they_would_hear_alone(rows, asked):
    """Also with prompts that begin alike, and with some that leave."""
    scheduler = Scheduler(ToySession(VOCAB), PrefixStore(1 << 20), rows=rows)
    heard = []
    for ids, count, leaves in asked:
        listener = Heard(most=2 if leaves else None)
        heard.append(ask(scheduler, ids, count, listener=listener))
    for (ids, count, leaves), listener in zip(asked, heard, strict=True):
        end = listener.wait()
        expected = alone(ids, count)
        if leaves and count >= 2:
            assert (listener.tokens, end.reason) == (expected[:2], "stop")
        else:
            assert listener.tokens == expected
    scheduler.close()


@pytest.mark.parametrize(
    ("ids", "draft", "message"),
    [
        ([], [], "the prompt is empty"),
        ([VOCAB], [], "no token id 50"),
        ([-1], [], "no token id -1"),
        ([1], [1, VOCAB], "no token id 50"),
    ],
)
def test_tokens_that_cannot_be_read(ids, draft, message, scheduler):
    with pytest.raises(RequestError, match=message):
        ask(scheduler, ids, draft=draft)


def test_rows_share_each_step(session: ToySession) -> None:
    scheduler = Scheduler(session, PrefixStore(0), rows=3)
    gate = threading.Event()
    first = ask(scheduler, [1], 20, listener=Heard(then=lambda: gate.wait(30)))
    others = [ask(scheduler, [2 + i], 20) for i in range(3)]
    gate.set()
    for heard in (first, *others):
        heard.wait()
    assert max(rows for rows, _ in session.calls) == 3
    assert sum(rows for rows, tokens in session.calls if tokens == 1) == 4 * 20
    assert scheduler.counters.steps < 4 * 19
    scheduler.close()


def test_a_prompt_is_read_between_the_steps_of_others(scheduler, session):
    gate = threading.Event()
    writer = ask(scheduler, [1], 400, listener=Heard(then=lambda: gate.wait(30)))
    reader = ask(scheduler, [2] * 3000, 1)
    gate.set()
    reader.wait()
    writer.wait()
    chunks = [place for place, (_, tokens) in enumerate(session.calls) if tokens > 1]
    assert len(chunks) > 3
    assert all(after - before > 1 for before, after in itertools.pairwise(chunks))


def test_what_was_read_is_not_read_again(scheduler: Scheduler, session: ToySession) -> None:
    prompt = list(range(40))
    first = ask(scheduler, prompt)
    assert first.wait().cached_tokens == 0
    before = session.fed
    again = ask(scheduler, prompt)
    assert again.wait().cached_tokens == 40
    assert again.tokens == first.tokens and session.fed == before + 4
    reply = prompt + first.tokens
    longer = ask(scheduler, [*reply, 7])
    assert longer.wait().cached_tokens == len(reply) - 1, "the last token was never fed"
    assert longer.tokens == alone([*reply, 7], 5)
    other = ask(scheduler, [*prompt[:30], 9])
    assert other.wait().cached_tokens == 0, "never past the common prefix"


def test_long_prompts_are_kept_in_steps(scheduler: Scheduler) -> None:
    prompt = [i % 7 for i in range(2 * KEPT_EVERY + 100)]
    ask(scheduler, prompt, 1, keep=[77]).wait()
    for shared, known in ((80, 77), (KEPT_EVERY + 9, KEPT_EVERY), (2 * KEPT_EVERY + 50, 1024)):
        branch = ask(scheduler, [*prompt[:shared], 9, 9], 1)
        assert branch.wait().cached_tokens == known
        assert branch.tokens == alone([*prompt[:shared], 9, 9], 1)


def test_one_reading_serves_all_that_wait_for_it(session: ToySession) -> None:
    """Requests with one prompt: the others wait until it is known."""
    scheduler, gate = Scheduler(session, PrefixStore(1 << 20), rows=4), threading.Event()
    blocker = ask(scheduler, [49], 2, listener=Heard(then=lambda: gate.wait(30)))
    prompt = [i % 5 for i in range(300)]
    heard = [ask(scheduler, prompt, 4) for _ in range(5)]
    gate.set()
    ends = [each.wait() for each in heard]
    blocker.wait()
    assert sorted(end.cached_tokens for end in ends) == [0, 300, 300, 300, 300]
    assert all(each.tokens == alone(prompt, 4) for each in heard)
    scheduler.close()


def test_stop_ids_end_a_reply_and_are_not_part_of_it(scheduler: Scheduler) -> None:
    expected = alone([5], 8)
    stop = expected[4]
    heard = ask(scheduler, [5], 8, stop_ids={stop})
    assert heard.wait().reason == "stop"
    assert heard.tokens == expected[: expected.index(stop)]


def test_who_leaves_frees_the_row_at_once(session: ToySession) -> None:
    scheduler, gate = Scheduler(session, PrefixStore(1 << 20), rows=1), threading.Event()
    heard = Heard(then=lambda: gate.wait(30))
    job = scheduler.submit(Request(ids=[1], listener=heard, max_new_tokens=10**6))
    waiting = Heard()
    gone = scheduler.submit(Request(ids=[2], listener=waiting, max_new_tokens=10**6))
    gone.cancel()
    job.cancel()
    gate.set()
    assert heard.wait().reason == "cancelled" and len(heard.tokens) <= 2
    assert waiting.wait().reason == "cancelled" and not waiting.tokens
    assert ask(scheduler, [3]).wait().reason == "length"
    assert scheduler.running == scheduler.waiting == 0
    scheduler.close()


def test_clients_take_turns(session: ToySession) -> None:
    scheduler, gate = Scheduler(session, PrefixStore(0), rows=1), threading.Event()
    order: list[str] = []
    blocker = ask(scheduler, [1], 1, listener=Heard(then=lambda: gate.wait(30)))
    heard = []
    for place, client in enumerate(["a", "a", "a", "b", "b", "c"]):
        listener = Heard(then=lambda client=client: order.append(client))
        heard.append(ask(scheduler, [2 + place], 1, client=client, listener=listener))
    urgent = Heard(then=lambda: order.append("first"))
    scheduler.submit(Request(ids=[40], listener=urgent, max_new_tokens=1, client="a", first=True))
    gate.set()
    for each in (blocker, urgent, *heard):
        each.wait()
    assert order == ["first", "b", "c", "a", "b", "a", "a"]


def test_an_engine_that_fails_ends_the_replies_and_goes_on(scheduler, session):
    session.failure, session.failing_step = RuntimeError("no memory"), 3
    end = ask(scheduler, [1, 2], 9).wait()
    assert end.reason == "error" and "the engine: no memory" in str(end.error)
    session.failure = None
    again = ask(scheduler, [1, 2], 9)
    assert again.wait().reason == "length" and again.tokens == alone([1, 2], 9)


def test_logits_that_are_no_numbers_end_one_reply(scheduler, session, monkeypatch):
    take = session._take

    def spoilt(rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        logits = take(rows, tokens, num_logits)
        logits[tokens[:, -1] == 33] = np.nan
        return logits

    monkeypatch.setattr(session, "_take", spoilt)
    bad, good = ask(scheduler, [1, 33]), ask(scheduler, [1, 2])
    assert "NaN or infinite" in str(bad.wait().error)
    assert good.wait().reason == "length"


def test_a_seed_repeats_in_company(scheduler: Scheduler) -> None:
    options = {"sampling": Sampling(temperature=1.0, seed=5)}
    single = ask(scheduler, [1, 2], 20, **options)
    single.wait()
    together = [ask(scheduler, ids, 20, **options) for ids in ([3], [1, 2], [4] * 70)]
    for heard in together:
        heard.wait()
    assert together[1].tokens == single.tokens and len({*single.tokens}) > 3


def test_a_mask_says_what_may_be_written(scheduler: Scheduler) -> None:
    class Even:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def allowed(self) -> np.ndarray:
            return np.arange(VOCAB) % 2 == len(self.seen) % 2

        def accept(self, token: int) -> None:
            self.seen.append(token)

    mask = Even()
    heard = ask(scheduler, [1], 10, mask=mask)
    heard.wait()
    assert [token % 2 for token in heard.tokens] == [0, 1] * 5
    assert mask.seen == heard.tokens[:-1], "nothing follows the last one"


def test_closing_ends_what_runs_and_waits(session: ToySession) -> None:
    scheduler = Scheduler(session, PrefixStore(1 << 20), rows=1)
    heard = [ask(scheduler, [i], 10**9) for i in range(3)]
    while not heard[0].tokens:
        time.sleep(0.001)
    scheduler.close()
    assert [each.wait().reason for each in heard] == ["cancelled"] * 3
    with pytest.raises(RequestError, match="the model is closed"):
        ask(scheduler, [1])


def test_logits_are_those_of_the_model(scheduler: Scheduler) -> None:
    heard = ask(scheduler, [4, 5], 3, sampling=Sampling(logit_bias={7: 100.0}))
    heard.wait()
    assert heard.tokens == [7, 7, 7]
    expected = ToySession(VOCAB).prefill(np.array([[4, 5, 7, 7]]), 3)[0]
    np.testing.assert_allclose(np.array(heard.logits), expected, rtol=1e-6)


def test_a_prompt_that_is_only_read_gives_its_state(scheduler: Scheduler) -> None:
    session = ToySession(VOCAB)
    session.prefill(np.array([[1, 2, 3]]))
    for _ in range(2):  # the second time it is known
        state = ask(scheduler, [1, 2, 3], 0).wait().state
        assert state is not None
        for name, array in session.get_state().items():
            np.testing.assert_array_equal(state[name], array)


def test_a_session_that_is_broken_for_good_tells_each_request(scheduler, session, monkeypatch):
    """As when its files were replaced: whoever waits hears of it, and nobody waits for ever."""

    def changed(*_: Any) -> None:
        raise RequestError("the model changed while it was open")

    monkeypatch.setattr(session, "_set_rows", changed)
    monkeypatch.setattr(session, "reset", changed)
    heard = [ask(scheduler, [i]) for i in range(5)]
    for each in heard:
        assert "the model changed while it was open" in str(each.wait().error)


def test_an_engine_that_fails_while_a_cancelled_reply_leaves(scheduler, session, monkeypatch):
    def broken(rows: range) -> Any:
        raise RuntimeError("no memory")

    heard, began = Heard(), threading.Event()
    heard._then = began.set
    job = scheduler.submit(Request(ids=[1], listener=heard, max_new_tokens=10**6))
    assert began.wait(30)
    with monkeypatch.context() as patched:
        patched.setattr(session, "get_rows", broken)
        job.cancel()
        assert "the engine: no memory" in str(heard.wait().error)
    assert ask(scheduler, [2]).wait().reason == "length", "the thread lives"
