"""A model that answers; what nobody waits for costs nothing, and failures stay where they are."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rgexport.chat.jobs import KEPT_EVERY
from rgexport.errors import RequestError
from tests.chat.conftest import until
from tests.toy_session import MEMORY, ToySession

HELLO = [{"role": "user", "content": "hello"}]
LONG = [{"role": "user", "content": "hello the model said it " * 400}]
ENDLESS = 10**8


@pytest.fixture
def session(gemma):
    return ToySession(gemma.vocab_size)


@pytest.fixture
def model(make_model, gemma, session):
    """One row, so that a second reply waits for the first."""
    return make_model(gemma, session)


def test_the_faces_say_the_same(make_model, gemma):
    model = make_model(gemma, rows=2)
    whole = model.chat(HELLO, max_new_tokens=9)
    stream = model.stream(HELLO, max_new_tokens=9)
    assert "".join(stream) == whole.text == stream.reply().text == stream.text
    assert repr(stream) == f"<ReplyStream length: {whole.text!r}>"

    async def listen():
        return "".join([piece async for piece in model.astream(HELLO, max_new_tokens=9)])

    assert asyncio.run(listen()) == whole.text == gemma.decode(whole.ids)
    assert whole.ids == stream.reply().ids and len(whole.ids) == 9
    assert whole.reason == "length"
    assert whole.prompt_tokens == len(model.conversation_prompt(HELLO).ids)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "messages are not a list"),
        ([{"role": "user"}], {}, "messages are not a list"),
        (HELLO, {"temperature": "hot"}, "a value of the wrong type"),
        (HELLO, {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        (HELLO, {"stop": "a"}, "stop is 'a'; expected a list of texts"),
        (HELLO, {"draft": "a"}, "draft is a text; expected its tokens"),
        (HELLO, {"tempreature": 1.0}, "there is no option tempreature; expected some of"),
        (HELLO, {"top_p": 2}, "top_p is 2; expected"),
    ],
)
def test_wrong_arguments_are_one_line(messages, options, message, model, make_model, gemma):
    with pytest.raises(RequestError, match=message):
        model.chat(messages, **options)
    with pytest.raises(RequestError, match="rows is 0"):
        make_model(gemma, rows=0)


def test_leaving_an_asynchronous_stream_ends_the_reply(model):
    async def listen():
        pieces = model.astream(HELLO, max_new_tokens=ENDLESS)
        assert isinstance(await anext(pieces), str)
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(listen())
    assert model.chat(HELLO, max_new_tokens=1).new_tokens == 1, "the row is free"
    state = model.state([2, 3])
    state[MEMORY][:] = -1
    assert not np.array_equal(model.state([2, 3])[MEMORY], state[MEMORY]), "a copy"


def test_a_half_read_chat_that_is_left_is_read_no_further(model, session, monkeypatch):
    take, streams, entered = session._take, list[Any](), threading.Event()

    def cancelling(rows, tokens, num_logits):
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


ABANDON = {
    "after a piece": lambda model: next(model.stream(HELLO, max_new_tokens=ENDLESS)),
    "pieces": lambda model: next(model.stream(HELLO, max_new_tokens=ENDLESS).pieces()),
    "at once": lambda model: model.complete("hello", max_new_tokens=ENDLESS) and None,
}


@pytest.mark.parametrize("how", ABANDON)
def test_a_stream_that_nobody_refers_to_ends(how, model):
    ABANDON[how](model)
    gc.collect()
    until(lambda: not model.scheduler.running and not model.scheduler.waiting)
    assert model.scheduler.counters.new_tokens < 10**6


def test_an_error_of_the_engine_reaches_each_face(model, session):
    async def listen():
        return [piece async for piece in model.astream(HELLO)]

    session.failure, session.failing_step = RuntimeError("no memory"), 3
    stream = model.stream(HELLO, max_new_tokens=9)
    for face in (stream.reply, stream.reply, lambda: next(stream), lambda: [*stream.pieces()]):
        with pytest.raises(RequestError, match="the engine: no memory"):
            face()
    assert stream.failed
    session.failing_step = 1
    with pytest.raises(RequestError, match="no memory"):
        asyncio.run(listen())


def test_closing_again_is_harmless(make_model, gemma, session, tmp_path):
    closed = []
    session.close = lambda: closed.append(1)  # type: ignore[method-assign]
    model = make_model(gemma, session, state_folder=tmp_path)
    streams = [model.stream(HELLO, max_new_tokens=ENDLESS) for _ in range(2)]  # one waits
    with ThreadPoolExecutor(9) as threads:
        for closing in [threads.submit(model.close) for _ in range(9)]:
            closing.result(30)
    assert closed == [1]
    assert [stream.reply().reason for stream in streams] == ["cancelled"] * 2
    with pytest.raises(RequestError, match="the model is closed"):
        model.chat(HELLO)
