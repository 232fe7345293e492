"""Many clients at once: quick, slow, vanishing, sending garbage, and each hears its own reply."""

import asyncio
import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import rgexport
from rgexport.chat.model import Model
from rgexport.cli import run
from rgexport.serve.app import Settings
from rgexport.serve.exchange import Limits
from tests.llama_tools import needs_llama_cpp
from tests.serve.conftest import Serve, Served, served_model

CHAT = "/v1/chat/completions"


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | fields


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
    _reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(begins[seed % 2] + data)
    await asyncio.sleep(0.2)
    writer.close()


def test_32_conversations_beside_bad_clients(serve: Serve) -> None:
    with serve(rows=8) as server:
        each_hears_its_own(server.model, server.url)


ARTIFACTS = {
    "onnx-int4-exact": "onnx --int4 --exact",
    "gguf-f32": "gguf --type f32",
}


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=name, marks=[needs_llama_cpp] * name.startswith("gguf"))
        for name, command in ARTIFACTS.items()
    ],
)
def test_32_conversations_with_the_demo(command: str, tmp_path: Path) -> None:
    target = tmp_path / "demo.gguf"
    assert run([*command.split(), "--size", "demo", "-o", str(target), "--no-check"]) == 0
    model = rgexport.load(target, rows=8)
    with served_model(model, Settings(log=False)) as url:  # which closes it
        each_hears_its_own(model, url)


def each_hears_its_own(model: Model, url: str) -> None:
    """Conversations of 32 clients, four of them slow, beside four that leave and four that err.

    Each hears what it would hear alone, if the greedy tokens do not depend on other rows.
    """
    texts = [f"hello {i} " * (1 + i % 9) for i in range(32)]
    expected = [
        model.chat([{"role": "user", "content": text}], max_new_tokens=40, temperature=0).text
        for text in texts
    ]
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
    idle(model)
    assert model.scheduler.counters.new_tokens < 3 * 32 * 40 + 4 * 4000


def idle(model: Model) -> None:
    """Waits until nothing is running: who vanished has left no row behind."""
    end = time.monotonic() + 20
    for _ in range(3):  # a reply that has ended begins the reading of its turn's end
        while model.scheduler.running or model.scheduler.waiting:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.02)
        model._settling.submit(int).result(20)


@pytest.mark.parametrize("streaming", [True, False])
def test_who_vanishes_frees_the_row(streaming: bool, serve: Serve) -> None:
    """Within steps, and not after the 10 million tokens that were asked for."""
    with serve(Settings(log=False, limits=Limits(new_tokens=10**7)), rows=1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        data = json.dumps(body("hello", max_tokens=10**7, stream=streaming)).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            while not server.model.scheduler.counters.new_tokens:
                time.sleep(0.01)
        idle(server.model)
        assert server.model.scheduler.counters.new_tokens < 10**6


def test_a_reader_that_does_not_read_holds_nobody_up(serve: Serve) -> None:
    with serve(rows=2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        data = json.dumps(body("hello", max_tokens=4000, stream=True)).encode()
        with socket.create_connection((host, int(port))) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            deaf.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            for i in range(5):
                answer = httpx.post(
                    server.url + CHAT, json=body(f"and {i}", max_tokens=9), timeout=30
                )
                assert answer.json()["usage"]["completion_tokens"] <= 9


def test_a_full_queue_is_429(serve: Serve) -> None:
    with serve(rows=1, max_waiting=1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        data = json.dumps(body("hello", max_tokens=4000, stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        opened = []
        try:
            for _ in range(2):
                opened.append(socket.create_connection((host, int(port))))
                opened[-1].sendall(request)
                while server.model.scheduler.running + server.model.scheduler.waiting < len(opened):
                    time.sleep(0.005)
            answers = [
                httpx.post(server.url + CHAT, json=body("no", max_tokens=1, **more), timeout=30)
                for more in ({}, {"stream": True}, {"n": 2})
            ]
        finally:
            for connection in opened:
                connection.close()
        for answer in answers:
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert "requests wait already" in answer.json()["error"]["message"]


def test_comments_while_a_prompt_is_read(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Settings(log=False, limits=Limits(ping_seconds=0.05))) as server:
        take = server.session._take

        def slow(rows: range, tokens: Any, num_logits: int) -> Any:
            time.sleep(0.3 if tokens.shape[1] > 1 else 0)
            return take(rows, tokens, num_logits)

        monkeypatch.setattr(server.session, "_take", slow)
        asked = body("hello", max_tokens=2, stream=True)
        with httpx.stream("POST", server.url + CHAT, json=asked, timeout=30) as answer:
            lines = [line for line in answer.iter_lines() if line]
    assert lines[0] == ": reading" and lines[-1] == "data: [DONE]"
    assert lines.count(": reading") >= 3


def test_nothing_is_left_behind(server: Served) -> None:
    """A thousand requests of all kinds: no row, no task, no growing memory of states."""
    kinds = [
        body("hello", max_tokens=2),
        body("hello", max_tokens=2, stream=True),
        body("hello", temperature=-1),
        {"prompt": "hello", "max_tokens": 1},
    ]

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for start in range(0, 1000, 20):
                asked = [kinds[i % 4] for i in range(start, start + 20)]
                paths = ["/v1/completions" if "prompt" in a else CHAT for a in asked]
                await asyncio.gather(
                    *(client.post(p, json=a) for p, a in zip(paths, asked, strict=True))
                )

    asyncio.run(all_of_them())
    idle(server.model)
    before = server.model.scheduler.store.nbytes
    asyncio.run(all_of_them())
    idle(server.model)
    assert server.model.scheduler.store.nbytes <= before
    assert not server.model.scheduler._admission._live


@pytest.mark.parametrize("streaming", [True, False])
def test_an_answer_has_its_time(
    streaming: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Settings(log=False, limits=Limits(seconds=0.3))) as server:
        take = server.session._take

        def slow(rows: range, tokens: Any, num_logits: int) -> Any:
            time.sleep(0.05)
            return take(rows, tokens, num_logits)

        monkeypatch.setattr(server.session, "_take", slow)
        asked = body("hello", max_tokens=1000, stream=streaming)
        answer = httpx.post(server.url + CHAT, json=asked, timeout=30)
        assert answer.status_code == (200 if streaming else 504)
        assert "the answer takes longer than 0.3 s" in answer.text
        idle(server.model)
        assert server.model.scheduler.counters.new_tokens < 50
