"""Clients do not see, hold up or pay for one another; who leaves is noticed at once."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.requests import Request

from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import ReplyOptions
from rgexport.serve import app, run
from rgexport.serve.answers import Answer
from rgexport.serve.app import Settings
from rgexport.serve.clients import network_of
from rgexport.serve.exchange import EventStream, Exchange, Limits, Work
from rgexport.serve.slots import ClientSlots, Slot
from rgexport.serve.text_process import TextProcess
from tests.serve.conftest import (
    CHAT,
    COMPLETE,
    cached,
    error_of,
    get,
    held,
    messages_of,
    post,
    send,
    until,
)

PROXIED: dict[str, Any] = {"log": False, "trusted_proxies": ("127.0.0.1",)}
"""The tests stand for a proxy that tells who the clients are."""
ANN, BOB, EVE = ({"X-Forwarded-For": f"10.0.0.{i}"} for i in (1, 2, 3))
TALK = {"filename": "talk"}


def complete(server, prompt, client, **headers):
    body = {"prompt": prompt, "max_tokens": 2}
    return cached(post(server, COMPLETE, body, **client, **headers).json())


def test_nothing_tells_that_another_client_has_sent_a_prompt(serve):
    for share, known in ((False, 0), (True, 5)):
        with serve(Settings(**PROXIED, share_prefixes=share)) as server:
            clients = ANN, BOB, ANN
            assert [complete(server, [5, 6, 7, 8, 9], each) for each in clients] == [0, known, 5]
    with serve(Settings(**PROXIED, api_key="sesame")) as server:
        key = {"Authorization": "Bearer sesame"}
        one_client = [complete(server, [5, 6, 7, 8, 9], each, **key) for each in (ANN, BOB)]
        assert one_client == [0, 5], "who has the key"


def test_the_folder_of_states_keeps_clients_apart(serve, tmp_path):
    address = ANN["X-Forwarded-For"]
    with serve(Settings(**PROXIED), state_folder=tmp_path) as server:
        complete(server, [5, 6, 7, 8, 9], ANN)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(address.encode() in path.read_bytes() for path in files)
    assert not any(address in str(path) for path in files)
    with serve(Settings(**PROXIED), state_folder=tmp_path) as server:
        assert [complete(server, [5, 6, 7, 8, 9, 10], each) for each in (BOB, ANN)] == [0, 5]


def test_slots_and_states_with_names_belong_to_a_client(serve, tmp_path):
    with serve(Settings(**PROXIED, saved=tmp_path)) as server:
        complete(server, "hello there", ANN)
        assert get(server, "/slots", **BOB).json() == []
        refused = post(server, "/slots/0?action=save", TALK, **BOB)
        assert "has seen nothing yet" in error_of(refused)
        assert post(server, "/slots/0?action=erase", {}, **BOB).json()["n_erased"] == 0
        assert post(server, "/slots/0?action=save", TALK, **ANN).status_code == 200
        for action in ("restore", "erase"):
            error_of(post(server, f"/slots/0?action={action}", TALK, **BOB), 404)
        complete(server, "another one", BOB)
        assert post(server, "/slots/0?action=save", TALK, **BOB).status_code == 200
        assert len([*tmp_path.glob("*/talk.state")]) == 2, "one of each"
        assert post(server, "/slots/7?action=restore", TALK, **ANN).json()["n_restored"] > 2
        assert post(server, "/slots/0?action=erase", {}, **ANN).json()["n_erased"] > 0


def test_states_with_names_are_shared_if_prefixes_are(serve, tmp_path):
    with serve(Settings(**PROXIED, saved=tmp_path, share_prefixes=True)) as server:
        complete(server, "hello there", ANN)
        assert post(server, "/slots/0?action=save", TALK, **ANN).status_code == 200
        assert (tmp_path / "talk.state").is_file()
        assert post(server, "/slots/0?action=restore", TALK, **BOB).status_code == 200
        assert post(server, "/slots/0?action=erase", {}, **EVE).json()["n_erased"] == 0


def test_a_client_cannot_push_out_the_slots_of_others():
    slots = ClientSlots(3)
    for owner, number in (("ann", 0), ("bob", 0), ("bob", 1), ("bob", 2), ("bob", 3)):
        slots.put(owner, "toy", number, Slot(number, None))
    assert [number for _, number, _ in slots.of("ann")] == [0]
    assert [number for _, number, _ in slots.of("bob")] == [2, 3]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "testclient", False),
    ],
)
def test_a_client_has_one_address_or_64_bits_of_them(one, other, same):
    assert (network_of(one) == network_of(other)) == same


def test_who_says_to_be_another_client_is_believed_only_by_option(serve, monkeypatch):
    with serve() as server:
        clients = [complete(server, "hello there", each) for each in (ANN, BOB)]
        assert clients[1] > 0, "both are 127.0.0.1"
    servers: list[Any] = []
    monkeypatch.setattr(
        run, "_run", lambda server, opened: (servers.append(server), opened.close())
    )
    run.serve({}, Settings(), TextProcess({}), run.Listening(port=0, grace_seconds=0))
    assert servers[0].config.proxy_headers is False


def test_names_of_users_give_no_turns(serve):
    with serve(Settings(**PROXIED), rows=1) as server, ThreadPoolExecutor(9) as pool:
        with held(server) as lengths:
            asked = [(9 + i, ANN, f"user {i}") for i in range(6)] + [(20, BOB, "bob")]
            for count, (length, client, user) in enumerate(asked):
                body = {"prompt": [length] * length, "max_tokens": 1, "user": user}
                pool.submit(post, server, COMPLETE, body, **client)
                until(lambda n=count: bool(lengths) and server.model.scheduler.waiting == n)
        pool.shutdown()
        assert lengths == [9, 10, 20, 11, 12, 13, 14]


@pytest.mark.parametrize("streaming", [True, False])
def test_who_leaves_the_queue_frees_the_place(streaming, serve):
    """Also while the engine is in the middle of something."""
    body = {"prompt": [5] * 8, "max_tokens": 1, "stream": streaming}
    with serve(rows=1, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        scheduler = server.model.scheduler
        with held(server) as lengths:
            first = pool.submit(post, server, COMPLETE, body)
            until(lambda: lengths)
            for _ in range(3):
                with send(server, COMPLETE, body | {"prompt": [6] * 9}):
                    until(lambda: scheduler.waiting == 1)
                until(lambda: scheduler.waiting == 0)
            last = pool.submit(post, server, COMPLETE, body | {"prompt": [7] * 7})
            until(lambda: scheduler.waiting == 1)
        assert first.result().status_code == last.result().status_code == 200
        assert lengths == [8, 7], "what the others asked for is not read"


@pytest.mark.parametrize("streaming", [True, False])
def test_who_leaves_before_the_text_is_tokenized_asks_for_nothing(streaming, serve, monkeypatch):
    make_works, entered, gate, left = app.chat_works, *(threading.Event() for _ in range(3))

    def slow(*args: Any) -> Any:
        entered.set()
        gate.wait(60)
        left.set()
        return make_works(*args)

    monkeypatch.setattr(app, "chat_works", slow)
    body = {"messages": messages_of("hello"), "stream": streaming, "max_tokens": 4000}
    with serve() as server:
        with send(server, CHAT, body):
            assert entered.wait(60)
        answered = f'answers_total{{path="{CHAT}",status="499"}} 1.0'
        try:
            until(lambda: answered in get(server, "/metrics").text)
        finally:
            gate.set()
        assert left.wait(60)
        complete(server, "hello", ANN)
        assert server.model.scheduler.counters.requests == 1


def test_a_stream_that_never_begins_ends_its_replies(serve):
    """The client leaves while the headers wait to be sent: nobody iterates over the answer."""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()

    async def answer(model) -> None:
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        work = Work(Prompt([5, 6]), ReplyOptions(max_new_tokens=10**8))
        shape = Answer("toy", model.tokenizer, chat=False, logprobs=False)
        request = Request(scope, receive)
        exchange = Exchange(request, model, shape, [work], Limits(), lambda _: None)
        await exchange.start()
        await EventStream(exchange, {}, with_usage=False)(scope, receive, send)

    with serve() as server:
        asyncio.run(answer(server.model))
        until(lambda: not server.model.scheduler.running)
        assert server.model.scheduler.counters.new_tokens < 10**6
