"""A server in a thread of its own, of a toy model unless a test brings another one."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from rgexport.chat.model import Model
from rgexport.chat.template import ChatTemplate
from rgexport.chat.tokenizer import Tokenizer
from rgexport.serve.app import Settings, create_app
from rgexport.serve.connections import Connections, protocol
from tests.chat.conftest import (
    IDENTITY,
    gemma,
    patient_masks,
    sentencepiece_folder,
    template,
    until,
)
from tests.toy_session import ToySession

__all__ = ["gemma", "patient_masks", "sentencepiece_folder", "template", "until"]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
Serve = Callable[..., Any]
PARTS = {"connections", "text_process", "health"}
"""Arguments of `served_model`; others are those of a model."""


@dataclass
class Served:
    """A running server; `session` is the engine of its toy model."""

    url: str
    model: Model
    session: ToySession


@contextmanager
def served(
    tokenizer: Tokenizer, template: ChatTemplate, settings: Settings, **options: Any
) -> Iterator[Served]:
    session = ToySession(tokenizer.vocab_size)
    parts = {name: options.pop(name) for name in PARTS & options.keys()}
    model = Model(session, tokenizer, template, IDENTITY, **({"rows": 4} | options))
    with served_model(model, settings, **parts) as url:
        yield Served(url, model, session)


@contextmanager
def served_model(
    model: Model, settings: Settings, connections: Connections | None = None, **parts: Any
) -> Iterator[str]:
    """The address of a server of this model, which is closed at the end."""
    config = uvicorn.Config(
        create_app({model.name: model}, settings, **parts),
        http=protocol(connections or Connections()),
        port=0,
        log_config=None,
        proxy_headers=False,
    )
    try:
        with running(uvicorn.Server(config)) as url:
            yield url
    finally:
        model.close()


@contextmanager
def running(server: uvicorn.Server) -> Iterator[str]:
    """The address of a server that ends with the block."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(
    gemma: Tokenizer, template: ChatTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One for all tests of a module; it keeps states by name."""
    saved = tmp_path_factory.mktemp("saved")
    with served(gemma, template, Settings(saved=saved, log=False)) as running:
        yield running


@pytest.fixture
def serve(gemma: Tokenizer, template: ChatTemplate) -> Serve:
    """Serves with other settings: a context manager."""

    def begin(settings: Settings | None = None, **options: Any) -> Any:
        return served(gemma, template, settings or Settings(log=False), **options)

    return begin


def get(server: Served, path: str, **headers: str) -> httpx.Response:
    return httpx.get(server.url + path, headers=headers, timeout=60)


def post(server: Served, path: str, body: Any = None, **headers: str) -> httpx.Response:
    """Sends JSON; bytes are sent as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, headers=JSON | headers, timeout=60)


def error_of(answer: httpx.Response, status: int = 400) -> str:
    """The message of a refusal."""
    assert answer.status_code == status, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def messages_of(*texts: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def chat(server: Served, *texts: str, address: str = "", **fields: Any) -> Any:
    """The next turn of a conversation; `address` is the one that a proxy would tell."""
    body = {"messages": messages_of(*texts), "temperature": 0, "max_tokens": 4} | fields
    answer = post(server, CHAT, body, **({"X-Forwarded-For": address} if address else {}))
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def cached(answer: Any) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert count == answer["timings"]["cache_n"]
    return count


def connect(server: Served, data: bytes = b"") -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(data)
    return connection


def send(server: Served, path: str, body: Any) -> socket.socket:
    """Sends a request, and leaves the answer to be read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return connect(server, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


@contextmanager
def held(server: Served) -> Iterator[list[int]]:
    """Holds the engine in its first call until the block ends; the lengths of what it reads."""
    take, gate, lengths = server.session._take, threading.Event(), list[int]()

    def holding(rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        lengths.append(tokens.shape[1])
        gate.wait(60)
        return take(rows, tokens, num_logits)

    server.session._take = holding  # type: ignore[method-assign]
    try:
        yield lengths
    finally:
        gate.set()


def slow_down(session: ToySession, seconds: float) -> None:
    """Lets each call of the engine take so long."""
    take = session._take
    session._take = lambda *args: (time.sleep(seconds), take(*args))[1]  # type: ignore[method-assign]
