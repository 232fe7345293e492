"""The process for long texts, and work that is skipped."""

import functools
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from rgexport.chat import prompts as prompts_module
from rgexport.chat.artifact_text import open_template
from rgexport.chat.jobs import EngineError
from rgexport.chat.prompts import Prompts
from rgexport.chat.template import load_template
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.identity import identity_of
from rgexport.export.opening import open_artifact
from rgexport.serve import offload
from rgexport.serve import text_process as text_process_module
from rgexport.serve.app import Settings
from rgexport.serve.errors import InvalidBody, TooLong
from rgexport.serve.exchange import Limits
from rgexport.serve.text_process import TextProcess, open_prompts, with_prompts
from tests.serve.conftest import COMPLETE, error_of, get, messages_of, post, send, until

MESSAGES = messages_of("hello the model " * 3000, "it is", "tokens")


def opened(folder: Path, most_tokens: int | None = None) -> Prompts:
    prompts = Prompts(load_tokenizer(folder), load_template(folder), known=lambda ids, namespace: 0)
    prompts.most_tokens = most_tokens
    return prompts


@pytest.fixture(scope="module")
def process(sentencepiece_folder):
    process = TextProcess({"toy": functools.partial(opened, sentencepiece_folder, 20_000)})
    yield process
    process.close()


def refused(message: str) -> None:
    raise InvalidBody(message, "field")


def test_a_call_is_another_processs(process):
    assert process.call(os.getpid) != os.getpid()
    if hasattr(os, "nice"):
        assert process.call(os.nice, 0) > os.nice(0)


def test_errors_come_back_whole(process):
    with pytest.raises(InvalidBody, match="no") as raised:
        process.call(refused, "no")
    assert raised.value.param == "field"
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        process.call(divmod, 1, 0)


def test_a_process_that_ends_or_takes_too_long_is_replaced(process, monkeypatch):
    processes = [process.call(os.getpid)]
    with pytest.raises(EngineError, match="ended"):
        process.call(os._exit, 3)
    processes.append(process.call(os.getpid))
    monkeypatch.setattr(text_process_module, "_SECONDS", 0.05)
    with pytest.raises(TooLong):
        process.call(time.sleep, 600)
    monkeypatch.undo()
    processes.append(process.call(os.getpid))
    assert len({*processes}) == 3


def test_a_closed_process_answers_no_more():
    process = TextProcess({})
    process.close()
    with pytest.raises(RequestError, match="the server ends"):
        process.call(os.getpid)


def test_prompts_are_those_of_this_process(process, sentencepiece_folder):
    here, there = opened(sentencepiece_folder), opened(sentencepiece_folder)
    calls = []

    def elsewhere(function: Callable[..., object], *args: object) -> object:
        calls.append(function)
        return process.call(with_prompts, "toy", function, *args)

    there.elsewhere = elsewhere
    prompt, closed = there.conversation_prompt(MESSAGES), [*MESSAGES, *messages_of("a", "yes")[1:]]
    assert prompt == here.conversation_prompt(MESSAGES) and len(prompt.keep) > 1
    assert there.conversation_ids(closed) == here.conversation_ids(closed)
    text = MESSAGES[0]["content"]
    assert there.text_ids(text) == here.text_ids(text)
    assert len(calls) == 3
    assert there.text_ids("hello") == here.text_ids("hello") and len(calls) == 3
    there._known = lambda ids, namespace: min(prompt.keep)
    assert sorted(there.conversation_prompt(MESSAGES).keep) == sorted(prompt.keep)[1:], "the unread"


def test_a_text_that_is_far_too_long_is_not_read_to_its_end(sentencepiece_folder, monkeypatch):
    prompts, read = opened(sentencepiece_folder, 100), []
    encode = prompts.tokenizer.raw_encode
    object.__setattr__(prompts.tokenizer, "raw_encode", lambda t: read.append(len(t)) or encode(t))
    monkeypatch.setattr(prompts_module, "_SLICE", 50)
    text = "hello the model " * 10_000
    for read_all in (prompts.encode, lambda text: prompts.conversation_prompt(messages_of(text))):
        read.clear()
        with pytest.raises(RequestError, match="more than 100 tokens; this server takes up to 100"):
            read_all(text)
        assert sum(read) < len(text) / 20


def test_a_server_reads_long_texts_in_the_process(serve, process, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("it was encoded by the server")

    text = "hello the model " * 5000
    settings = Settings(log=False, limits=Limits(prompt_tokens=20_000))
    with serve(settings, text_process=process) as server:
        tokenizer = server.model.tokenizer
        ids = tokenizer.encode_text(text)
        for name in ("encode_text", "encode_markup"):
            monkeypatch.setattr(type(tokenizer), name, fail)
        assert post(server, "/tokenize", {"content": text}).json() == {"tokens": ids}
        error_of(post(server, "/detokenize", {"tokens": ids * 2}))
        applied = post(server, "/apply-template", {"messages": messages_of(text)})
        assert len(applied.json()["tokens"]) > len(ids)
        done = post(server, COMPLETE, {"prompt": text, "max_tokens": 1}).json()
        assert done["usage"]["prompt_tokens"] == len(ids) + 1
        for path in ("/tokenize", COMPLETE):
            answer = post(server, path, {"content": text * 9, "prompt": text * 9})
            assert "up to 20000" in error_of(answer)
        wrong = post(server, COMPLETE, {"prompt": text, "n": 99})
        assert error_of(wrong) and wrong.json()["error"]["param"] == "n"


def test_work_for_a_client_that_left_is_skipped(serve, monkeypatch):
    """Two threads read long bodies; what waits for them when its client leaves is not read."""
    begun, go, read = threading.Semaphore(0), threading.Event(), list[bytes]()
    parse = offload.parse

    def slow(kind: object, data: bytes) -> object:
        read.append(data)
        begun.release()
        go.wait(60)
        return parse(kind, data)

    monkeypatch.setattr(offload, "parse", slow)
    with serve() as server, ExitStack() as clients:
        for text in "ab":
            clients.enter_context(send(server, "/tokenize", {"content": text * offload.LONG}))
            assert begun.acquire(timeout=60)
        gone = [send(server, "/tokenize", {"content": "c" * offload.LONG}) for _ in range(5)]
        assert get(server, "/health").status_code == 200
        for each in gone:
            each.close()
        until(lambda: 'status="499"} 5.0' in get(server, "/metrics").text)
        go.set()
        assert post(server, "/tokenize", {"content": "a"}).status_code == 200
    assert not any(b"c" * 10 in data for data in read)


def test_another_artifact_is_refused(demo_artifact):
    artifact = open_artifact(demo_artifact)
    identity = identity_of(artifact.manifest, open_template(artifact).source)
    assert open_prompts(demo_artifact, identity, 5).most_tokens == 5
    with pytest.raises(EngineError, match="changed while it was open"):
        open_prompts(demo_artifact, replace(identity, name="another"), 5)
