"""Many clients at once: quick, slow, vanishing, sending garbage, and each hears its own reply."""

import asyncio
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

import rgexport
from rgexport.chat.model import Model
from rgexport.serve.app import Settings
from rgexport.serve.exchange import Limits
from tests.artifacts import export_demo
from tests.llama_tools import needs_llama_cpp
from tests.serve.conftest import (
    CHAT,
    COMPLETE,
    chat,
    error_of,
    messages_of,
    post,
    send,
    served_model,
    slow_down,
    until,
)


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": messages_of(text), "temperature": 0} | fields


async def streamed(client: httpx.AsyncClient, asked: dict[str, Any], wait: float = 0) -> str:
    text = ""
    async with client.stream("POST", CHAT, json=asked | {"stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                await asyncio.sleep(wait)
    return text


async def vanishing(client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
    async with client.stream("POST", CHAT, json=asked | {"stream": True}) as answer:
        async for _ in answer.aiter_lines():
            return


async def garbage(url: str, seed: int) -> None:
    host, port = url.removeprefix("http://").split(":")
    data = random.Random(seed).randbytes(2000)
    begins = (b"", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999\r\n\r\n")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(begins[seed % 2] + data)
    await asyncio.sleep(0.2)
    writer.close()


def test_32_conversations_beside_bad_clients(serve):
    with serve(rows=8) as server:
        each_hears_its_own(server.model, server.url)


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    ["onnx --int4 --exact", pytest.param("gguf --type f32", marks=needs_llama_cpp)],
)
def test_32_conversations_with_the_demo(command, tmp_path):
    target = tmp_path / "demo.gguf"
    export_demo(target, *command.split(), "--no-check")
    model = rgexport.load(target, rows=8, threads=1)
    with served_model(model, Settings(log=False)) as url:  # which closes it
        each_hears_its_own(model, url)


def each_hears_its_own(model: Model, url: str) -> None:
    """Conversations of 32 clients, four of them slow, beside four that leave and four that err.

    Each hears what it would hear alone, if the greedy tokens do not depend on other rows.
    """
    texts = [f"hello {i} " * (1 + i % 9) for i in range(32)]
    alone = {"max_new_tokens": 40, "temperature": 0}
    expected = [model.chat(messages_of(text), **alone).text for text in texts]
    model.scheduler.store.clear()

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            good = [
                streamed(client, body(text, max_tokens=40), 0.02 if i < 4 else 0)
                for i, text in enumerate(texts)
            ]
            bad = [vanishing(client, body(f"gone {i}", max_tokens=4000)) for i in range(4)]
            noise = [garbage(url, seed) for seed in range(4)]
            return (await asyncio.gather(*good, *bad, *noise))[:32]

    assert asyncio.run(all_of_them()) == expected
    wait_until_idle(model)
    assert model.scheduler.counters.new_tokens < 3 * 32 * 40 + 4 * 4000


def wait_until_idle(model: Model) -> None:
    for _ in range(3):  # a reply that has ended begins the reading of its turn's end
        until(lambda: not model.scheduler.running and not model.scheduler.waiting)
        time.sleep(0.02)
        model._settling.submit(int).result(60)


@pytest.mark.parametrize("streaming", [True, False])
def test_who_vanishes_frees_the_row(streaming, serve):
    """Within steps, and not after the 10 million tokens that were asked for."""
    with serve(Settings(log=False, limits=Limits(new_tokens=10**7)), rows=1) as server:
        scheduler = server.model.scheduler
        with send(server, CHAT, body("hello", max_tokens=10**7, stream=streaming)):
            until(lambda: scheduler.counters.new_tokens)
        wait_until_idle(server.model)
        assert scheduler.counters.new_tokens < 10**6


def test_a_reader_that_does_not_read_holds_nobody_up(serve):
    asked = body("hello", max_tokens=4000, stream=True)
    with serve(rows=2) as server, send(server, CHAT, asked) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for i in range(5):
            assert chat(server, f"and {i}", max_tokens=9)["usage"]["completion_tokens"] <= 9


def test_a_full_queue_is_429(serve):
    with serve(rows=1, max_waiting=1) as server, ExitStack() as clients:
        scheduler = server.model.scheduler
        for count in (1, 2):
            asked = body("hello", max_tokens=4000, stream=True)
            clients.enter_context(send(server, CHAT, asked))
            until(lambda n=count: scheduler.running + scheduler.waiting >= n)
        for more in ({}, {"stream": True}, {"n": 2}):
            answer = post(server, CHAT, body("no", max_tokens=1, **more))
            assert "requests wait already" in error_of(answer, 429)
            assert answer.headers["retry-after"] == "1"


def test_requests_that_find_a_row_do_not_count_as_waiting(serve):
    with serve(rows=8, max_waiting=0) as server:
        for n in (1, 8):
            assert len(chat(server, "hello", n=n)["choices"]) == n


def test_more_replies_than_can_ever_wait_are_refused(serve):
    with serve(rows=2, max_waiting=30) as server:
        answer = post(server, COMPLETE, {"prompt": ["hello"] * 64, "n": 16})
        assert "asks for 1024 replies; this server takes up to 32" in error_of(answer)


def test_comments_while_a_prompt_is_read(serve):
    with serve(Settings(log=False, limits=Limits(ping_seconds=0.05))) as server:
        slow_down(server.session, 0.3)
        lines = post(server, CHAT, body("hello", max_tokens=2, stream=True)).text.split("\n\n")
    assert lines[0] == ": reading" and lines[-2] == "data: [DONE]"
    assert lines.count(": reading") >= 3


def test_nothing_is_left_behind(serve):
    """Hundreds of requests of all kinds: no row, no task, no growing memory of states."""
    kinds = [
        (CHAT, body("hello", max_tokens=2)),
        (CHAT, body("hello", max_tokens=2, stream=True)),
        (CHAT, body("hello", temperature=-1)),
        (COMPLETE, {"prompt": "hello", "max_tokens": 1}),
    ]
    with serve() as server, ThreadPoolExecutor(12) as pool:
        nbytes = []
        for _ in range(2):
            for answer in [pool.submit(post, server, *kind) for kind in 40 * kinds]:
                assert answer.result().status_code in (200, 400)
            wait_until_idle(server.model)
            nbytes.append(server.model.scheduler.store.nbytes)
        assert nbytes[1] <= nbytes[0]
        assert not server.model.scheduler._admission._live


@pytest.mark.parametrize("streaming", [True, False])
def test_an_answer_has_its_time(streaming, serve):
    with serve(Settings(log=False, limits=Limits(seconds=0.3))) as server:
        slow_down(server.session, 0.05)
        answer = post(server, CHAT, body("hello", max_tokens=1000, stream=streaming))
        assert answer.status_code == (200 if streaming else 504)
        assert "the answer takes longer than 0.3 s" in answer.text
        wait_until_idle(server.model)
        assert server.model.scheduler.counters.new_tokens < 50
