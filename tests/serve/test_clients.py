"""Clients do not see, hold up or pay for one another; who leaves is noticed at once."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
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
from tests.serve.conftest import Serve, Served

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
PROXY = ("127.0.0.1",)
"""The tests stand for a proxy that tells who the clients are."""
ANN, BOB = "10.0.0.1", "10.0.0.2"


def post(server: Served, path: str, body: Any, address: str = ANN, **options: Any) -> Any:
    headers = {"X-Forwarded-For": address} | options.pop("headers", {})
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60, **options)


def chat(server: Served, address: str, *texts: str, **fields: Any) -> Any:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    body = {"messages": messages, "temperature": 0, "max_tokens": 4} | fields
    answer = post(server, CHAT, body, address)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: Any) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert count == answer["timings"]["cache_n"]
    return count


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_nothing_tells_that_another_client_has_sent_a_prompt(serve: Serve) -> None:
    with serve(Settings(log=False, trusted_proxies=PROXY)) as server:
        first = chat(server, ANN, "hello there")
        assert cached(first) == 0 and cached(chat(server, BOB, "hello there")) == 0
        known = first["usage"]["prompt_tokens"]
        assert cached(chat(server, ANN, "hello there")) == known
    with serve(Settings(log=False, trusted_proxies=PROXY, share_prefixes=True)) as server:
        chat(server, ANN, "hello there")
        assert cached(chat(server, BOB, "hello there")) == known, "as it was asked for"


def test_one_key_is_one_client(serve: Serve) -> None:
    settings = Settings(log=False, trusted_proxies=PROXY, api_key="sesame")
    headers = {"Authorization": "Bearer sesame"}
    with serve(settings) as server:
        for address, known in ((ANN, 0), (BOB, 5)):
            body = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 1}
            answer = post(server, COMPLETE, body, address, headers=headers)
            assert cached(answer.json()) == known


def test_the_folder_of_states_keeps_clients_apart(serve: Serve, tmp_path: Path) -> None:
    settings = Settings(log=False, trusted_proxies=PROXY)
    body = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 2}
    with serve(settings, state_folder=tmp_path) as server:
        post(server, COMPLETE, body, ANN)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(ANN.encode() in path.read_bytes() for path in files)
    assert not any(ANN in str(path) for path in files)
    body["prompt"] = [5, 6, 7, 8, 9, 10]
    with serve(settings, state_folder=tmp_path) as server:
        assert cached(post(server, COMPLETE, body, BOB).json()) == 0
        assert cached(post(server, COMPLETE, body, ANN).json()) == 5


def test_slots_and_states_with_names_belong_to_a_client(serve: Serve, tmp_path: Path) -> None:
    settings = Settings(log=False, trusted_proxies=PROXY, saved=tmp_path)
    named = {"filename": "talk"}
    with serve(settings) as server:
        chat(server, ANN, "hello there")
        listed = httpx.get(f"{server.url}/slots", headers={"X-Forwarded-For": BOB}).json()
        assert listed == []
        refused = post(server, "/slots/0?action=save", named, BOB)
        assert refused.status_code == 400 and "has seen nothing yet" in refused.text
        assert post(server, "/slots/0?action=erase", {}, BOB).json()["n_erased"] == 0
        assert post(server, "/slots/0?action=save", named, ANN).status_code == 200
        for action in ("restore", "erase"):
            assert post(server, f"/slots/0?action={action}", named, BOB).status_code == 404
        chat(server, BOB, "another one")
        assert post(server, "/slots/0?action=save", named, BOB).status_code == 200
        assert len([*tmp_path.glob("*/talk.state")]) == 2, "one of each"
        restored = post(server, "/slots/7?action=restore", named, ANN).json()
        assert restored["n_restored"] > 5
        assert post(server, "/slots/0?action=erase", {}, ANN).json()["n_erased"] > 0


def test_states_with_names_are_shared_if_prefixes_are(serve: Serve, tmp_path: Path) -> None:
    settings = Settings(log=False, trusted_proxies=PROXY, saved=tmp_path, share_prefixes=True)
    with serve(settings) as server:
        chat(server, ANN, "hello there")
        assert post(server, "/slots/0?action=save", {"filename": "talk"}, ANN).status_code == 200
        assert (tmp_path / "talk.state").is_file()
        assert post(server, "/slots/0?action=restore", {"filename": "talk"}, BOB).status_code == 200
        assert post(server, "/slots/0?action=erase", {}, "10.0.0.3").json()["n_erased"] == 0


def test_a_client_cannot_push_out_the_slots_of_others() -> None:
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
def test_a_client_has_one_address_or_64_bits_of_them(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) == same


def test_who_says_to_be_another_client_is_believed_only_by_option(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as server:
        chat(server, ANN, "hello there")
        assert cached(chat(server, BOB, "hello there")) > 0, "both are 127.0.0.1"
    servers: list[Any] = []
    monkeypatch.setattr(
        run, "_run", lambda server, opened: (servers.append(server), opened.close())
    )
    run.serve({}, Settings(), TextProcess({}), run.Listening(port=0, grace_seconds=0))
    assert servers[0].config.proxy_headers is False


@contextmanager
def held(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Holds the engine in its first call until the block ends; the prompts' lengths as read."""
    take, gate, lengths = server.session._take, threading.Event(), list[int]()

    def holding(rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        lengths.append(tokens.shape[1])
        gate.wait(60)
        return take(rows, tokens, num_logits)

    monkeypatch.setattr(server.session, "_take", holding)
    try:
        yield lengths
    finally:
        gate.set()


def test_names_of_users_give_no_turns(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serve(Settings(log=False, trusted_proxies=PROXY), rows=1) as server,
        ThreadPoolExecutor(9) as pool,
    ):
        with held(server, monkeypatch) as lengths:
            asked = [(9 + i, ANN, f"user {i}") for i in range(6)] + [(20, BOB, "bob")]
            scheduler = server.model.scheduler
            for count, (length, address, user) in enumerate(asked):
                body = {"prompt": [length] * length, "max_tokens": 1, "user": user}
                pool.submit(post, server, COMPLETE, body, address)
                until(lambda count=count: bool(lengths) and scheduler.waiting == count)
        pool.shutdown()
        assert lengths == [9, 10, 20, 11, 12, 13, 14]


def connect(server: Served, path: str, body: Any) -> socket.socket:
    """Sends a request, and leaves the answer to be read."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("streaming", [True, False])
def test_who_leaves_the_queue_frees_the_place(
    streaming: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the engine is in the middle of something."""
    body = {"prompt": [5] * 8, "max_tokens": 1, "stream": streaming}
    with serve(rows=1, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        scheduler = server.model.scheduler
        with held(server, monkeypatch) as lengths:
            first = pool.submit(post, server, COMPLETE, body)
            until(lambda: bool(lengths))
            for _ in range(3):
                with connect(server, COMPLETE, body | {"prompt": [6] * 9}):
                    until(lambda: scheduler.waiting == 1)
                until(lambda: scheduler.waiting == 0)
            last = pool.submit(post, server, COMPLETE, body | {"prompt": [7] * 7})
            until(lambda: scheduler.waiting == 1)
        assert first.result().status_code == last.result().status_code == 200
        assert lengths == [8, 7], "what the others asked for is not read"


@pytest.mark.parametrize("streaming", [True, False])
def test_who_leaves_before_the_text_is_tokenized_asks_for_nothing(
    streaming: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_works, entered, gate, left = app.chat_works, *(threading.Event() for _ in range(3))

    def slow(*args: Any) -> Any:
        entered.set()
        gate.wait(60)
        left.set()
        return make_works(*args)

    monkeypatch.setattr(app, "chat_works", slow)
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": streaming}
    with serve() as server:
        with connect(server, CHAT, body | {"max_tokens": 4000}):
            assert entered.wait(30)
        answered = f'answers_total{{path="{CHAT}",status="499"}} 1.0'
        try:
            until(lambda: answered in httpx.get(f"{server.url}/metrics").text)
        finally:
            gate.set()
        assert left.wait(30)
        assert post(server, COMPLETE, {"prompt": "hello", "max_tokens": 2}).status_code == 200
        assert server.model.scheduler.counters.requests == 1


def test_a_stream_that_never_begins_ends_its_replies(serve: Serve) -> None:
    """The client leaves while the headers wait to be sent: nobody iterates over the answer."""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()

    async def answer(server: Served) -> None:
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        work = Work(Prompt([5, 6]), ReplyOptions(max_new_tokens=10**8))
        shape = Answer("toy", server.model.tokenizer, chat=False, logprobs=False)
        exchange = Exchange(
            Request(scope, receive), server.model, shape, [work], Limits(), lambda _: None
        )
        await exchange.start()
        await EventStream(exchange, {}, with_usage=False)(scope, receive, send)

    with serve() as server:
        asyncio.run(answer(server))
        until(lambda: not server.model.scheduler.running)
        assert server.model.scheduler.counters.new_tokens < 10**6
