"""A model that answers: streams, asyncio, log probabilities, stop strings."""

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest

import rgexport
from rgexport.chat.model import Model
from rgexport.chat.reply import Piece, Reply, ReplyOptions
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from tests.toy_session import MEMORY, ToySession

MakeModel = Callable[..., Model]
HELLO = [{"role": "user", "content": "hello"}]


def test_the_faces_say_the_same(make_model: MakeModel, gemma: Tokenizer) -> None:
    model = make_model(gemma, rows=2)
    whole = model.chat(HELLO, max_new_tokens=9)
    stream = model.stream(HELLO, max_new_tokens=9)
    assert "".join(stream) == whole.text == stream.reply().text

    async def listen() -> str:
        return "".join([piece async for piece in model.astream(HELLO, max_new_tokens=9)])

    assert asyncio.run(listen()) == whole.text
    assert whole.ids == stream.reply().ids and len(whole.ids) == 9
    assert (whole.reason, whole.prompt_tokens) == (
        "length",
        len(model.conversation_prompt(HELLO).ids),
    )
    assert gemma.decode(whole.ids) == whole.text


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ("Hi", {}, "the messages are not a list"),
        ([], {}, "the messages are not a list"),
        ([{"role": "user"}], {}, "the messages are not a list"),
        (HELLO, {"temperature": "hot"}, "a value of the wrong type"),
        (HELLO, {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        (HELLO, {"stop": "a"}, "stop is 'a'; expected a list of texts"),
        (HELLO, {"draft": "a"}, "draft is a text; expected its tokens"),
        (HELLO, {"tempreature": 1.0}, "there is no option tempreature; expected some of"),
        (HELLO, {"top_p": 2}, "top_p is 2; expected"),
    ],
)
def test_wrong_arguments_are_one_line(messages, options, message, make_model, gemma):
    with pytest.raises(RequestError, match=message):
        make_model(gemma).chat(messages, **options)
    with pytest.raises(RequestError, match="rows is 0"):
        make_model(gemma, rows=0)


def test_many_at_once_in_asyncio(make_model: MakeModel, gemma: Tokenizer) -> None:
    model = make_model(gemma, rows=3)
    asked = [[{"role": "user", "content": f"hello {i}"}] for i in range(8)]
    alone = [model.chat(messages, max_new_tokens=7).text for messages in asked]
    model.scheduler.store.clear()

    async def listen(messages: list[dict[str, str]]) -> str:
        return "".join([p async for p in model.astream(messages, max_new_tokens=7)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(listen, asked))

    assert asyncio.run(all_of_them()) == alone


def test_leaving_a_stream_ends_the_reply(make_model: MakeModel, gemma: Tokenizer) -> None:
    model = make_model(gemma)

    async def listen() -> None:
        pieces = model.astream(HELLO, max_new_tokens=10**8)
        assert isinstance(await anext(pieces), str)
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(listen())
    assert model.chat(HELLO, max_new_tokens=1).new_tokens == 1, "the row is free"
    end = time.monotonic() + 20
    while model.scheduler.running:  # the end of the turn is read
        assert time.monotonic() < end
        time.sleep(0.01)
    state = model.state([2, 3])
    state[MEMORY][:] = -1
    assert not np.array_equal(model.state([2, 3])[MEMORY], state[MEMORY]), "a copy"


@pytest.mark.parametrize("stop", ["llo th", "o", "said", "never"])
def test_stop_strings_lie_across_tokens(stop: str, make_model: MakeModel, gemma: Tokenizer) -> None:
    session, text = ToySession(gemma.vocab_size), "hello the model said it"
    model = make_model(gemma, session)
    session.script = [i for c in text for i in gemma.encode_text(c)] + [1]
    stream = model.stream(HELLO, max_new_tokens=99, stop=[stop, ""], logprobs=0)
    pieces = [*stream.pieces()]
    expected = text.partition(stop)[0]
    assert "".join(piece.text for piece in pieces) == expected == stream.reply().text
    assert stream.reply().reason == "stop"
    assert sum(len(piece.tokens) for piece in pieces) == len(stream.reply().ids)


def test_an_error_of_the_engine_reaches_each_face(make_model: MakeModel, gemma: Tokenizer) -> None:
    session = ToySession(gemma.vocab_size)
    model = make_model(gemma, session)

    async def listen() -> list[Piece | Reply]:
        prompt = model.conversation_prompt(HELLO)
        return [item async for item in model.deliver(prompt, ReplyOptions())]

    session.failure, session.failing_step = RuntimeError("no memory"), 1
    with pytest.raises(RequestError, match="no memory"):
        model.chat(HELLO)
    session.failing_step = 1
    with pytest.raises(RequestError, match="no memory"):
        asyncio.run(listen())


def test_load_is_the_packages_own(tmp_path) -> None:
    with pytest.raises(RequestError, match="none"):
        rgexport.load(tmp_path / "none")
    with pytest.raises(AttributeError, match="no attribute 'store'"):
        _ = rgexport.store  # type: ignore[attr-defined]
