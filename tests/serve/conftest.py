"""A server in a thread of its own, of a toy model unless a test brings another one."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from rgexport.chat.model import Model
from rgexport.serve.app import create_app
from rgexport.serve.guards import Connections, protocol
from rgexport.serve.server import ServerSettings
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


class Client:
    """What tests ask of a server at `url`."""

    url: str

    def get(self, path, **headers):
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def post(self, path, body=None, **headers):
        """Sends JSON; bytes are sent as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=content, headers=JSON | headers, timeout=60)

    def chat(self, *texts, **fields):
        """Returns the answer to the next turn of a conversation."""
        body = {"messages": messages_of(*texts), "temperature": 0, "max_tokens": 4} | fields
        answer = self.post(CHAT, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def connect(self, data=b""):
        url = httpx.URL(self.url)
        connection = socket.create_connection((url.host, url.port), timeout=60)
        connection.sendall(data)
        return connection

    def send(self, path, body):
        """Sends a request, and leaves the answer to be read."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return self.connect(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


@dataclass
class Served(Client):
    """A running server; `session` is the engine of its toy model."""

    url: str
    model: Model
    session: ToySession


@contextmanager
def served(tokenizer, template, settings, connections=None, **options):
    """A server of a toy model with these options; it is closed at the end."""
    session = ToySession(tokenizer.vocab_size)
    parts = {name: options.pop(name) for name in {"text_process"} & options.keys()}
    model = Model(session, tokenizer, template, IDENTITY, **({"rows": 4} | options))
    app, http = create_app({model.name: model}, settings, **parts), connections or Connections()
    fixed = {"port": 0, "log_config": None, "proxy_headers": False, "lifespan": "off"}
    config = uvicorn.Config(app, http=protocol(http), **fixed)
    try:
        with running(uvicorn.Server(config)) as url:
            yield Served(url, model, session)
    finally:
        model.close()


@contextmanager
def running(server):
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
def server(gemma, template, tmp_path_factory):
    """One for all tests of a module; it keeps states by name."""
    saved = tmp_path_factory.mktemp("saved")
    with served(gemma, template, ServerSettings(saved=saved, log=False)) as running:
        yield running


@pytest.fixture
def serve(gemma, template):
    """Serves with other settings: a context manager."""

    def begin(settings=None, **options):
        return served(gemma, template, settings or ServerSettings(log=False), **options)

    return begin


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def messages_of(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def said(answer):
    return answer["choices"][0]["message"]["content"]


def cached(answer):
    usage, timings = answer["usage"], answer["timings"]
    count = usage["prompt_tokens_details"]["cached_tokens"]
    assert (count, usage["prompt_tokens"] - count) == (timings["cache_n"], timings["prompt_n"])
    return count


@contextmanager
def held(server):
    """Holds the engine in its first call until the block ends; the lengths of what it reads."""
    take, gate, lengths = server.session._take, threading.Event(), []

    def holding(rows, tokens, num_logits):
        lengths.append(tokens.shape[1])
        gate.wait(60)
        return take(rows, tokens, num_logits)

    server.session._take = holding
    try:
        yield lengths
    finally:
        gate.set()


def delay(session, seconds):
    """Lets each call of the engine take so long."""
    take = session._take
    session._take = lambda *args: (time.sleep(seconds), take(*args))[1]
