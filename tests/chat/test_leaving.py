"""Replies that nobody waits for any more cost nothing, and failures stay where they are."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rgexport.chat.jobs import KEPT_EVERY, Token
from rgexport.chat.model import Model
from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import Reply, ReplyOptions
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from tests.chat.conftest import until
from tests.chat.test_scheduler import Heard, ask
from tests.toy_session import ToySession

MakeModel = Callable[..., Model]
HELLO = [{"role": "user", "content": "hello"}]
LONG = [{"role": "user", "content": "hello the model said it " * 400}]
ENDLESS = 10**8


@pytest.fixture
def session(gemma: Tokenizer) -> ToySession:
    return ToySession(gemma.vocab_size)


@pytest.fixture
def model(make_model: MakeModel, gemma: Tokenizer, session: ToySession) -> Model:
    """One row, so that a second reply waits for the first."""
    return make_model(gemma, session)


def test_a_queued_chat_that_is_left_is_never_read(model: Model, session: ToySession) -> None:
    gate = threading.Event()
    blocker = ask(model.scheduler, [5], 2, listener=Heard(then=lambda: gate.wait(30)))
    queued = model.stream(LONG, max_new_tokens=9)
    queued.cancel()
    assert model.scheduler.waiting == 0
    gate.set()
    assert queued.reply().reason == "cancelled" and queued.reply().ids == ()
    blocker.wait()
    model.read([6]).result(30)
    assert session.fed == 3, "two prompts of one token, and a step"


def test_a_half_read_chat_that_is_left_is_read_no_further(model, session, monkeypatch):
    take, streams, entered = session._take, list[Any](), threading.Event()

    def cancelling(rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        entered.wait(30)
        if session.fed >= KEPT_EVERY:
            streams[0].cancel()
        return take(rows, tokens, num_logits)

    monkeypatch.setattr(session, "_take", cancelling)
    streams.append(model.stream(LONG, max_new_tokens=9))
    entered.set()
    assert streams[0].reply().reason == "cancelled" and streams[0].reply().ids == ()
    read, ids = session.fed, model.conversation_prompt(LONG).ids
    model.read([6]).result(30)
    assert read + 1 == session.fed < len(ids)
    assert model.scheduler.store.length(ids) == read, "what was read is not read again"


def abandon_in_a_cycle(model: Model) -> None:
    stream: Any = model.stream(HELLO, max_new_tokens=ENDLESS)
    next(stream)
    stream.itself = stream


ABANDON: dict[str, Callable[[Model], object]] = {
    "after a piece": lambda model: next(model.stream(HELLO, max_new_tokens=ENDLESS)),
    "in a cycle": abandon_in_a_cycle,
    "pieces": lambda model: next(model.stream(HELLO, max_new_tokens=ENDLESS).pieces()),
    "at once": lambda model: model.complete("hello", max_new_tokens=ENDLESS) and None,
}


@pytest.mark.parametrize("how", ABANDON)
def test_a_stream_that_nobody_refers_to_ends(how, model):
    ABANDON[how](model)
    gc.collect()
    until(lambda: not model.scheduler.running and not model.scheduler.waiting)
    assert model.scheduler.counters.new_tokens < 10**6


def test_a_stream_that_is_still_referred_to_goes_on(model: Model) -> None:
    stream = model.stream(HELLO, max_new_tokens=30)
    for _ in stream:
        break
    gc.collect()
    assert stream.reply().new_tokens == 30


def test_an_error_of_the_engine_is_raised_again(model: Model, session: ToySession) -> None:
    session.failure, session.failing_step = RuntimeError("no memory"), 3
    stream = model.stream(HELLO, max_new_tokens=9)
    for again in (stream.reply, stream.reply, lambda: next(stream), lambda: [*stream.pieces()]):
        with pytest.raises(RequestError, match="the engine: no memory"):
            again()
    assert stream.failed


def test_a_future_that_is_cancelled_ends_its_reading_alone(model, session):
    gate = threading.Event()
    blocker = ask(model.scheduler, [5], 4, listener=Heard(then=lambda: gate.wait(30)))
    reading = model.read(list(range(300)))
    assert reading.cancel()
    gate.set()
    assert blocker.wait().reason == "length", "the reply beside it goes on"
    assert len(model.read([6]).result(30).state or {}) > 0
    assert session.fed < 300, "nothing of it is read"


def test_a_future_that_is_cancelled_when_its_reading_ends(make_model, gemma, session, monkeypatch):
    """As late as it can be: while the last chunk is read."""
    model, take = make_model(gemma, session, rows=2), session._take
    gate, readings = threading.Event(), list[Any]()

    def cancelling(rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        if tokens.shape[1] == 3:
            readings[0].cancel()
        return take(rows, tokens, num_logits)

    monkeypatch.setattr(session, "_take", cancelling)
    beside = ask(model.scheduler, [5], 20, listener=Heard(then=lambda: gate.wait(30)))
    readings.append(model.read([4, 6, 7]))
    gate.set()
    assert beside.wait().reason == "length"
    until(lambda: readings[0].cancelled() and not model.scheduler.running)
    assert model.scheduler.store.length([4, 6, 7]) == 3


class Failing(Heard):
    """A listener that fails at a token or at the end."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def token(self, token: Token) -> bool:
        if self._at == "token":
            raise ValueError("no room")
        return super().token(token)

    def end(self, end: Any) -> None:
        super().end(end)
        if self._at == "end":
            raise ValueError("no room")


@pytest.mark.parametrize(("at", "reason"), [("token", "error"), ("end", "length")])
def test_a_listener_that_raises_ends_its_own_reply(at, reason, make_model, gemma):
    scheduler = make_model(gemma, rows=2).scheduler
    gate, failing = threading.Event(), Failing(at)
    good = ask(scheduler, [5], 20, listener=Heard(then=lambda: gate.wait(30)))
    ask(scheduler, [6], 4, listener=failing)
    gate.set()
    assert good.wait().reason == "length" and len(good.tokens) == 20
    assert failing.wait().reason == reason
    assert at == "end" or "no room" in str(failing.wait().error)
    assert scheduler.running == 0


def test_closing_again_is_harmless(make_model, gemma, session, tmp_path):
    closed: list[int] = []
    session.close = lambda: closed.append(1)  # type: ignore[method-assign]
    model = make_model(gemma, session, state_folder=tmp_path)
    stream = model.stream(HELLO, max_new_tokens=ENDLESS)
    threads = [threading.Thread(target=model.close, daemon=True) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    model.close()
    assert closed == [1] and stream.reply().reason == "cancelled"
    with pytest.raises(RequestError, match="the model is closed"):
        model.chat(HELLO)


@pytest.mark.parametrize(
    ("ids", "wrong"), [([3, -1, 5], "-1"), ([-(2**70), 1], str(-(2**70))), ([1, 2**70], str(2**70))]
)
def test_the_id_that_is_wrong_is_named(ids, wrong, model, tmp_path):
    message = f"no token id {wrong}: the model has {model.vocab_size} tokens; expected ids from 0"
    with pytest.raises(RequestError, match=message):
        model.state(ids)
    with pytest.raises(RequestError, match=message):
        model.save_state(tmp_path / "a.state", [4, *ids])
    with pytest.raises(RequestError, match=message):
        model.start(Prompt([1]), ReplyOptions(draft=ids), lambda _: None)
    assert not [*tmp_path.iterdir()]


def test_a_reply_whose_receiver_fails_is_over(model: Model) -> None:
    def refuse(item: object) -> None:
        raise ValueError("no room")

    model.start(Prompt([5]), ReplyOptions(max_new_tokens=ENDLESS), refuse)
    until(lambda: not model.scheduler.running and not model.scheduler.waiting)
    assert isinstance(model.stream(HELLO, max_new_tokens=3).reply(), Reply)
