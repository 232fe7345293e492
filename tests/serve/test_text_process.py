"""The process for long texts, and work that is skipped."""

import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from rgexport.chat import prompts as prompts_module
from rgexport.chat.jobs import EngineError
from rgexport.chat.prompts import Prompts
from rgexport.chat.template import load_template
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.serve import offload
from rgexport.serve import text_process as text_process_module
from rgexport.serve.app import Settings
from rgexport.serve.errors import InvalidBody, TooLong
from rgexport.serve.exchange import Limits
from rgexport.serve.text_process import TextProcess, open_prompts, with_prompts
from tests.serve.conftest import Serve, Served

MESSAGES = [
    {"role": "user", "content": "hello the model " * 3000},
    {"role": "assistant", "content": "it is"},
    {"role": "user", "content": "tokens"},
]


def opened(folder: Path, most_tokens: int | None = None) -> Prompts:
    prompts = Prompts(load_tokenizer(folder), load_template(folder), known=lambda ids, namespace: 0)
    prompts.most_tokens = most_tokens
    return prompts


@pytest.fixture(scope="module")
def process(sentencepiece_folder: Path) -> Iterator[TextProcess]:
    found = TextProcess({"toy": functools.partial(opened, sentencepiece_folder, 20_000)})
    yield found
    found.close()


def refused(message: str) -> None:
    raise InvalidBody(message, "field")


def test_a_call_is_another_processs(process: TextProcess) -> None:
    assert process.call(os.getpid) != os.getpid()
    if hasattr(os, "nice"):
        assert process.call(os.nice, 0) > os.nice(0)


def test_errors_come_back_whole(process: TextProcess) -> None:
    with pytest.raises(InvalidBody, match="no") as raised:
        process.call(refused, "no")
    assert raised.value.param == "field"
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        process.call(divmod, 1, 0)


def test_a_process_that_ends_is_replaced(process: TextProcess) -> None:
    first = process.call(os.getpid)
    with pytest.raises(EngineError, match="ended"):
        process.call(os._exit, 3)
    assert process.call(os.getpid) != first


def test_a_call_that_takes_too_long_ends(
    process: TextProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = process.call(os.getpid)
    monkeypatch.setattr(text_process_module, "_SECONDS", 0.05)
    with pytest.raises(TooLong):
        process.call(time.sleep, 600)
    monkeypatch.undo()
    assert process.call(os.getpid) != first


def test_a_closed_process_answers_no_more(sentencepiece_folder: Path) -> None:
    made = TextProcess({})
    made.close()
    with pytest.raises(RequestError, match="the server ends"):
        made.call(os.getpid)


def test_prompts_are_those_of_this_process(
    process: TextProcess, sentencepiece_folder: Path
) -> None:
    here, there = opened(sentencepiece_folder), opened(sentencepiece_folder)
    calls = []

    def elsewhere(function: Callable[..., object], *args: object) -> object:
        calls.append(function)
        return process.call(with_prompts, "toy", function, *args)

    there.elsewhere = elsewhere
    assert there.conversation_prompt(MESSAGES) == here.conversation_prompt(MESSAGES)
    closed = [*MESSAGES, {"role": "assistant", "content": "yes"}]
    assert there.conversation_ids(closed) == here.conversation_ids(closed)
    text = MESSAGES[0]["content"]
    assert there.text_ids(text) == here.text_ids(text)
    assert len(calls) == 3
    assert there.text_ids("hello") == here.text_ids("hello") and len(calls) == 3


def test_places_that_are_known_are_not_kept(
    process: TextProcess, sentencepiece_folder: Path
) -> None:
    there = opened(sentencepiece_folder)
    there.elsewhere = functools.partial(process.call, with_prompts, "toy")
    keep = there.conversation_prompt(MESSAGES).keep
    assert len(keep) > 1
    there._known = lambda ids, namespace: min(keep)
    assert sorted(there.conversation_prompt(MESSAGES).keep) == sorted(keep)[1:]


def test_a_text_that_is_far_too_long_is_not_read_to_its_end(
    sentencepiece_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    made = opened(sentencepiece_folder, 100)
    encode = made.tokenizer.raw_encode
    object.__setattr__(made.tokenizer, "raw_encode", lambda t: read.append(len(t)) or encode(t))
    monkeypatch.setattr(prompts_module, "_SLICE", 50)
    text = "hello the model " * 10_000
    long = [{"role": "user", "content": text}]
    for refuse in (lambda: made.encode(text), lambda: made.conversation_prompt(long)):
        read.clear()
        with pytest.raises(RequestError, match="more than 100 tokens; this server takes up to 100"):
            refuse()
        assert sum(read) < len(text) / 20


@pytest.fixture
def small(serve: Serve, process: TextProcess) -> Iterator[Served]:
    limits = Limits(prompt_tokens=20_000)
    with serve(Settings(log=False, limits=limits), text_process=process) as running:
        yield running


def test_a_server_reads_long_texts_in_the_process(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str) -> list[int]:
        raise AssertionError("it was encoded by the server")

    text = "hello the model " * 5000
    expected = small.model.tokenizer.encode_text(text)
    monkeypatch.setattr(type(small.model.tokenizer), "encode_text", lambda self, text: fail(text))
    monkeypatch.setattr(type(small.model.tokenizer), "encode_markup", lambda self, text: fail(text))

    def post(path: str, **body: object) -> httpx.Response:
        return httpx.post(small.url + path, json=body, timeout=60)

    assert post("/tokenize", content=text).json() == {"tokens": expected}
    assert post("/detokenize", tokens=expected * 2).status_code == 400
    messages = [{"role": "user", "content": text}]
    assert len(post("/apply-template", messages=messages).json()["tokens"]) > len(expected)
    done = post("/v1/completions", prompt=text, max_tokens=1)
    assert done.json()["usage"]["prompt_tokens"] == len(expected) + 1
    for path in ("/tokenize", "/v1/completions"):
        answer = post(path, content=text * 9, prompt=text * 9)
        assert answer.status_code == 400 and "up to 20000" in answer.json()["error"]["message"]
    wrong = post("/v1/completions", prompt=text, n=99)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "n"


def test_work_for_a_client_that_left_is_skipped(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads read long bodies; what waits for them when its client leaves is not read."""
    begun, go = threading.Semaphore(0), threading.Event()
    read: list[bytes] = []
    parse = offload.parse

    def slow(kind: object, data: bytes) -> object:
        read.append(data)
        begun.release()
        go.wait(60)
        return parse(kind, data)

    monkeypatch.setattr(offload, "parse", slow)
    with serve() as server:
        host, port = server.url.removeprefix("http://").split(":")

        def ask(text: str) -> socket.socket:
            data = json.dumps({"content": text * offload.LONG}).encode()
            head = (
                "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            opened = socket.create_connection((host, int(port)))
            opened.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            return opened

        with ask("a"), ask("b"):
            assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
            gone = [ask("c") for _ in range(5)]
            short = httpx.get(f"{server.url}/health", timeout=60)
            assert short.status_code == 200
            for each in gone:
                each.close()
            while "499" not in httpx.get(f"{server.url}/metrics").text:
                time.sleep(0.02)
            while 'status="499"} 5.0' not in httpx.get(f"{server.url}/metrics").text:
                time.sleep(0.02)
            go.set()
        assert httpx.post(f"{server.url}/tokenize", json={"content": "a"}).status_code == 200
    assert not any(b"c" * 10 in data for data in read)


def test_another_artifact_is_refused(demo_artifact: Path) -> None:
    from dataclasses import replace

    from rgexport.chat.artifact_text import open_template
    from rgexport.export.identity import identity_of
    from rgexport.export.opening import open_artifact

    artifact = open_artifact(demo_artifact)
    identity = identity_of(artifact.manifest, open_template(artifact).source)
    assert open_prompts(demo_artifact, identity, 5).most_tokens == 5
    with pytest.raises(EngineError, match="changed while it was open"):
        open_prompts(demo_artifact, replace(identity, name="another"), 5)
