"""What runs beside the event loop: long texts, grammars, and an error where they are too much."""

import functools
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import Mock

import pytest

from rgexport.artifacts.manifest import identity_of
from rgexport.artifacts.opening import open_artifact
from rgexport.chat import prompts as prompts_module
from rgexport.chat.artifact_text import open_template
from rgexport.chat.jobs import EngineError
from rgexport.chat.prompts import PromptEncoder, load_template
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.serve import grammar as grammar_module
from rgexport.serve import server as server_module
from rgexport.serve import text_process as text_process_module
from rgexport.serve.errors import InvalidBody, TooLong
from rgexport.serve.exchange import Limits
from rgexport.serve.grammar import Grammars, GrammarSource
from rgexport.serve.server import ServerSettings
from rgexport.serve.text_process import TextProcess, open_encoder
from tests.serve.conftest import COMPLETE, cached, error_of, messages_of, said, until

LETTERS = [chr(i) for i in range(ord("A"), ord("z")) if chr(i).isalnum()]
RULES = "x: " + " | ".join(f'"{c}" e' for c in LETTERS) + '\ne: | "0"\n'
RULES += "".join(f'r{i}: x x x x t{i}\nt{i}: "{i}"\n' for i in range(50))
MANY = " | ".join(f"r{i}" for i in range(50))
"""Many items for one mask: 50 rules after each of four letters."""


def opened(folder):
    prompts = PromptEncoder(
        load_tokenizer(folder), load_template(folder), known=lambda ids, namespace: 0
    )
    prompts.most_tokens = 20_000
    return prompts


def refuse(message):
    raise InvalidBody(message, "field")


def test_calls_run_elsewhere_and_errors_come_back_whole(monkeypatch):
    """A process that ends or takes too long is replaced."""
    process = TextProcess({})
    processes = [os.getpid(), process.call(os.getpid)]
    assert process.call(os.nice, 0) > os.nice(0)
    with pytest.raises(InvalidBody, match="no") as raised:
        process.call(refuse, "no")
    assert raised.value.param == "field"
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        process.call(divmod, 1, 0)
    with pytest.raises(EngineError, match="ended"):
        process.call(os._exit, 3)
    processes.append(process.call(os.getpid))
    monkeypatch.setattr(text_process_module, "_CALL_SECONDS", 0.05)
    with pytest.raises(TooLong):
        process.call(time.sleep, 600)
    monkeypatch.undo()
    processes.append(process.call(os.getpid))
    assert len({*processes}) == 4
    process.close()
    with pytest.raises(RequestError, match="the server ends"):
        process.call(os.getpid)


def test_a_server_reads_long_texts_in_the_process(serve, sentencepiece_folder, monkeypatch):
    fail = Mock(side_effect=AssertionError("it was encoded by the server"))
    text = "hello the model " * 5000
    process = TextProcess({"toy": functools.partial(opened, sentencepiece_folder)})
    settings = ServerSettings(log=False, limits=Limits(prompt_tokens=20_000))
    with serve(settings, text_process=process) as server:
        tokenizer = server.model.tokenizer
        ids = tokenizer.encode_text(text)
        for name in ("encode_text", "encode_markup"):
            monkeypatch.setattr(type(tokenizer), name, fail)
        assert server.post("/tokenize", {"content": text}).json() == {"tokens": ids}
        error_of(server.post("/detokenize", {"tokens": ids * 2}))
        applied = server.post("/apply-template", {"messages": messages_of(text)})
        assert len(applied.json()["tokens"]) > len(ids)
        reply = said(server.chat(text))
        assert cached(server.chat(text, reply, "and now")) > len(applied.json()["tokens"])
        done = server.post(COMPLETE, {"prompt": text, "max_tokens": 1}).json()
        assert done["usage"]["prompt_tokens"] == len(ids) + 1
        for path in ("/tokenize", COMPLETE):
            answer = server.post(path, {"content": text * 9, "prompt": text * 9})
            assert "up to 20000" in error_of(answer)
        wrong = server.post(COMPLETE, {"prompt": text, "n": 99})
        assert error_of(wrong) and wrong.json()["error"]["param"] == "n"
    process.close()


def test_another_artifact_is_refused(demo_artifact):
    artifact = open_artifact(demo_artifact)
    identity = identity_of(artifact.manifest, open_template(artifact).source)
    assert open_encoder(demo_artifact, identity, 5).most_tokens == 5
    with pytest.raises(EngineError, match="changed while it was open"):
        open_encoder(demo_artifact, replace(identity, name="another"), 5)


def test_work_for_a_client_that_left_is_skipped(serve, monkeypatch):
    """Two threads read long bodies; what waits for them when its client leaves is not read."""
    begun, go, read, parse = threading.Semaphore(0), threading.Event(), [], server_module.parse

    def slow(kind, data):
        read.append(data)
        begun.release()
        go.wait(60)
        return parse(kind, data)

    monkeypatch.setattr(server_module, "parse", slow)
    with serve() as server, ExitStack() as clients:
        for text in "ab":
            clients.enter_context(server.send("/tokenize", {"content": text * server_module.LONG}))
            assert begun.acquire(timeout=60)
        gone = [server.send("/tokenize", {"content": "c" * server_module.LONG}) for _ in range(5)]
        assert server.get("/health").status_code == 200
        for each in gone:
            each.close()
        until(lambda: 'status="499"} 5.0' in server.get("/metrics").text)
        go.set()
        assert server.post("/tokenize", {"content": "a"}).status_code == 200
    assert not any(b"c" * 10 in data for data in read)


def schema_of(properties, **more):
    """An answer in JSON with so many optional strings."""
    names = {f"property {i}": {"type": "string"} | more for i in range(properties)}
    named = {"name": "x", "schema": {"type": "object", "properties": names}}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def complete(server, **fields):
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0} | fields
    return server.post(COMPLETE, body)


class Gate:
    """Counts the grammars that are compiled, and lets none pass before it is opened."""

    def __init__(self, compile):
        self.open, self.reached = threading.Event(), threading.Event()
        self.texts = []
        self._compile = compile

    def __call__(self, grammars, source):
        self.texts.append(source.text)
        self.reached.set()
        assert self.open.wait(60)
        return self._compile(grammars, source)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(Grammars._compiled)
    monkeypatch.setattr(Grammars, "_compiled", lambda self, source: gate(self, source))
    yield gate
    gate.open.set()


def test_a_grammar_is_compiled_once(serve, gate):
    gate.open.set()
    with serve() as server:
        for _ in range(2):
            answer = complete(server, prompt=["hello", "the"], n=3, max_tokens=1, **schema_of(2))
            assert len(answer.json()["choices"]) == 6
        assert len(gate.texts) == 1
        assert complete(server, regex="[ab]+").status_code == 200 and len(gate.texts) == 2
        messages = [error_of(complete(server, grammar="start: nothing")) for _ in range(2)]
    assert len(gate.texts) == 3 and messages[0] == messages[1], "an error is known, too"
    assert "the grammar cannot be used" in messages[0] and "nothing" in messages[0]


def test_a_grammar_has_its_time_to_compile(serve, gate, monkeypatch):
    """Meanwhile others are served, and a grammar whose client has left is not compiled."""
    monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 1.0)
    monkeypatch.setattr(grammar_module, "MOST_COMPILING", 2)
    with serve() as server, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(complete, server, regex=text) for text in "abc"]
        errors = {each.result().json()["error"]["message"] for each in asked}
        with server.send(COMPLETE, {"prompt": ["a"] * 64, "regex": "left"}):
            assert complete(server).status_code == 200
        until(lambda: 'status="499"} 1.0' in server.get("/metrics").text)
        gate.open.set()
        assert complete(server, regex="[ab]+").status_code == 200
    assert errors == {
        "the grammar takes longer than 1 s to compile; use a simpler one",
        "other grammars took 1 s to compile; try again later",
        "2 grammars wait to be compiled; try again later",
    }
    assert len(gate.texts) == 2 and "left" not in gate.texts


@pytest.mark.parametrize(
    ("start", "is_stream", "status"),
    [
        (f"start: {MANY}\n", False, 400),
        (f'start: "q" r\nr: {MANY}\n', False, 400),
        (f'start: "q" r\nr: {MANY}\n', True, 200),
    ],
    ids=["at once", "later", "in a stream"],
)
def test_a_grammar_beyond_the_limits_is_an_error(start, is_stream, status, serve, monkeypatch):
    few = grammar_module._LIMITS | {"step_max_items": 1000}
    monkeypatch.setattr(grammar_module, "_LIMITS", few)
    with serve() as server:
        answer = complete(server, grammar=start + RULES, stream=is_stream)
    assert answer.status_code == status
    assert "Too many items (limit 1000" in answer.text and '"stop"' not in answer.text
    if is_stream:
        assert answer.text.rstrip().split("\n\n")[-1].startswith('data: {"error"')


@pytest.mark.parametrize("short_seconds", [grammar_module._SHORT_SECONDS, 0.0])
def test_replies_fit_their_grammar(short_seconds, server, monkeypatch):
    """Where a mask is slow, tokens are consumed without the lock."""
    monkeypatch.setattr(grammar_module, "_SHORT_SECONDS", short_seconds)
    for field, source, pattern in (
        ("regex", "[0-9]{3}-[a-f]{2}", "[0-9]{3}-[a-f]{2}"),
        ("grammar", 'root ::= [0-9] [0-9] "a"?', "[0-9]{2}a?"),
        ("grammar", "start: /[0-9]/ /[a-z]/", "[0-9][a-z]"),
    ):
        answer = complete(server, max_tokens=30, n=4, temperature=1, **{field: source})
        texts = [choice["text"] for choice in answer.json()["choices"]]
        assert all(re.fullmatch(pattern, text) for text in texts) and len({*texts}) > 1


def test_a_grammar_beyond_the_row_limit(server):
    """With 1,000 optional properties, the first token can be written, and no more."""
    answer = complete(server, max_tokens=1, **schema_of(1000))
    assert answer.json()["choices"][0]["text"] == "{"
    assert "max is 1000" in error_of(complete(server, **schema_of(1000)))
    assert error_of(complete(server, **schema_of(5000))).startswith("the JSON schema has ")


def test_a_text_that_is_far_too_long_is_not_read_to_its_end(sentencepiece_folder, monkeypatch):
    prompts, lengths = opened(sentencepiece_folder), []
    prompts.most_tokens = 100
    encode = prompts.tokenizer.raw_encode
    object.__setattr__(
        prompts.tokenizer, "raw_encode", lambda t: lengths.append(len(t)) or encode(t)
    )
    monkeypatch.setattr(prompts_module, "_SLICE", 50)
    text = "hello the model " * 10_000
    for read in (prompts.encode, lambda text: prompts.conversation_prompt(messages_of(text))):
        lengths.clear()
        with pytest.raises(RequestError, match="more than 100 tokens; this server takes up to 100"):
            read(text)
        assert sum(lengths) < len(text) / 20


def test_known_grammars_are_bounded(server, monkeypatch):
    monkeypatch.setattr(grammar_module, "_MOST_KNOWN", 3)
    grammars = Grammars(server.model.tokenizer, server.model.vocab_size)
    sources = [GrammarSource("regex", "a" * (1 + i)) for i in range(5)]
    for source in sources:
        grammars.compile(source)
    assert [grammars.known(source) is not None for source in sources] == [0, 0, 1, 1, 1]
