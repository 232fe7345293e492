"""Grammars of requests: compiled once, beside everything else; an error where they are too much."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from rgexport.chat import scheduler as scheduler_module
from rgexport.chat.jobs import Busy
from rgexport.chat.masks import MaskThreads
from rgexport.errors import RequestError
from rgexport.serve import grammar as grammar_module
from rgexport.serve.compiling import Compiler
from rgexport.serve.exchange import Gone
from rgexport.serve.grammar import CompiledGrammar, Grammars, GrammarSource
from tests.serve.conftest import Serve, Served

COMPLETIONS = "/v1/completions"
AMBIGUOUS = 'start: s\ns: s s | s s s | "a" | '
LETTERS = [chr(i) for i in range(ord("A"), ord("z")) if chr(i).isalnum()]
RULES = "x: " + " | ".join(f'"{c}" e' for c in LETTERS) + '\ne: | "0"\n'
RULES += "".join(f'r{i}: x x x x t{i}\nt{i}: "{i}"\n' for i in range(50))
MANY = " | ".join(f"r{i}" for i in range(50))
"""Many items for one mask: 50 rules after each of four letters."""


@pytest.fixture
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that a small grammar has more, and a large one need not be computed."""
    limits = grammar_module._LIMITS | {"step_max_items": 1000}
    monkeypatch.setattr(grammar_module, "_LIMITS", limits)
    monkeypatch.setattr(scheduler_module, "MaskThreads", partial(MaskThreads, seconds=60))


def optional_strings(count: int, **more: Any) -> dict[str, Any]:
    properties = {f"property {i}": {"type": "string"} | more for i in range(count)}
    return {"type": "object", "properties": properties}


def schema_body(schema: dict[str, Any]) -> dict[str, Any]:
    named = {"name": "x", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def post(server: Served, **fields: Any) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0} | fields
    return httpx.post(server.url + COMPLETIONS, json=body, timeout=60)


class Gate:
    """Counts the grammars that are compiled, and lets none pass before it is opened."""

    def __init__(self, compiled: Callable[..., CompiledGrammar]) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.sources: list[GrammarSource] = []
        self._compiled = compiled

    def __call__(self, grammars: Grammars, source: GrammarSource) -> CompiledGrammar:
        self.sources.append(source)
        self.reached.set()
        assert self.open.wait(60)
        return self._compiled(grammars, source)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(Grammars._compiled)
    monkeypatch.setattr(Grammars, "_compiled", lambda self, source: made(self, source))
    yield made
    made.open.set()


def test_a_schema_is_compiled_once(serve: Serve, gate: Gate) -> None:
    gate.open.set()
    with serve() as server:
        for _ in range(2):
            fields = schema_body({"type": "object", "maxProperties": 2})
            answer = post(server, prompt=["hello", "the"], n=3, max_tokens=1, **fields)
            assert len(answer.json()["choices"]) == 6
        assert len(gate.sources) == 1
        assert post(server, regex="[ab]+").status_code == 200
        assert len(gate.sources) == 2


def test_a_grammar_that_failed_is_not_compiled_again(serve: Serve, gate: Gate) -> None:
    gate.open.set()
    with serve() as server:
        answers = [post(server, grammar="start: nothing") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [400, 400] and len(gate.sources) == 1
    assert answers[0].json() == answers[1].json()
    message = answers[0].json()["error"]["message"]
    assert "the grammar cannot be used" in message and "nothing" in message


def test_known_grammars_are_bounded(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_MOST_KNOWN", 3)
    grammars = Grammars(server.model.tokenizer, server.model.vocab_size)
    sources = [GrammarSource("regex", "a" * (1 + i)) for i in range(5)]
    for source in sources[:3]:
        grammars.compile(source)
    grammars.known(sources[0])
    for source in sources[3:]:
        grammars.compile(source)
    assert [grammars.known(source) is not None for source in sources] == [1, 0, 0, 1, 1]


def test_a_burst_of_grammars_stops_nobody(serve: Serve, gate: Gate) -> None:
    """40 clients send a grammar and leave: others are served, and what waits is not compiled."""
    with serve() as server:
        host, port = server.url.removeprefix("http://").split(":")

        async def leave(i: int) -> None:
            body = {"prompt": ["a"] * 64, "n": 4, "max_tokens": 1}
            body |= schema_body(optional_strings(100, pattern=f"^[a-z]{{3,{9 + i}}}$"))
            data = json.dumps(body).encode()
            _, writer = await asyncio.open_connection(host, int(port))
            head = (
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
            )
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            await writer.drain()
            if i == 0:
                await asyncio.to_thread(gate.reached.wait, 30)
            writer.close()

        async def burst() -> None:
            await leave(0)
            await asyncio.gather(*(leave(i) for i in range(1, 40)))

        asyncio.run(burst())
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        assert post(server).status_code == 200
        assert httpx.post(f"{server.url}/tokenize", json={"content": "a"}).status_code == 200
        gate.open.set()
        assert post(server, regex="[ab]+").status_code == 200
        assert len(gate.sources) == 2


class FakeGrammars(Grammars):
    """Knows no grammar, and compiles none."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.gate, self.reached = threading.Event(), threading.Event()

    def known(self, source: GrammarSource) -> None:
        return None

    def compile(self, source: GrammarSource) -> Any:
        self.texts.append(source.text)
        self.reached.set()
        assert self.gate.wait(60)
        return source.text


async def forever() -> None:
    await asyncio.Event().wait()


def test_who_left_is_skipped() -> None:
    async def scenario() -> None:
        compiler, grammars, left = Compiler(60), FakeGrammars(), asyncio.Event()

        def ask(text: str, until_left: Any) -> Any:
            source = GrammarSource("regex", text)
            return asyncio.create_task(compiler.compile(grammars, source, until_left))

        async def gone() -> None:
            await left.wait()

        first, second, third = ask("a", gone), ask("b", gone), ask("c", forever)
        await asyncio.to_thread(grammars.reached.wait, 30)
        left.set()
        for each in (first, second):
            with pytest.raises(Gone):
                await each
        grammars.gate.set()
        assert await third == "c" and grammars.texts == ["a", "c"]
        compiler.close()

    asyncio.run(scenario())


def test_a_grammar_has_its_time_to_compile() -> None:
    async def scenario() -> None:
        compiler, grammars = Compiler(seconds=0.1, most=2), FakeGrammars()
        ask = partial(compiler.compile, grammars, client_left=forever)
        waiting = [asyncio.create_task(ask(GrammarSource("regex", text))) for text in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="2 grammars wait to be compiled"):
            await ask(GrammarSource("regex", "c"))
        first, second = await asyncio.gather(*waiting, return_exceptions=True)
        assert "takes longer than 0.1 s to compile; use a simpler grammar" in str(first)
        assert isinstance(second, Busy) and "other grammars took 0.1 s" in str(second)
        grammars.gate.set()
        compiler.close()
        assert grammars.texts == ["a"]

    asyncio.run(scenario())


@pytest.mark.usefixtures("few_items")
def test_a_grammar_beyond_the_limits_is_refused(serve: Serve) -> None:
    with serve() as server:
        answer = post(server, grammar=f"start: {MANY}\n{RULES}")
    assert answer.status_code == 400
    assert "Too many items (limit 1000" in answer.json()["error"]["message"]


@pytest.mark.usefixtures("few_items")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_grammar_beyond_the_limits_later_is_an_error(streaming: bool, serve: Serve) -> None:
    with serve() as server:
        answer = post(server, grammar=f'start: "q" r\nr: {MANY}\n{RULES}', stream=streaming)
    assert answer.status_code == (200 if streaming else 400)
    assert "Too many items (limit 1000" in answer.text and '"stop"' not in answer.text
    if streaming:
        assert answer.text.rstrip().split("\n\n")[-1].startswith('data: {"error"')


def test_an_ambiguous_grammar_fits_its_grammar(server: Served) -> None:
    (token,) = server.model.tokenizer.encode_text("a")
    fields = {"grammar": AMBIGUOUS, "logit_bias": {str(token): 100}}
    (choice,) = post(server, max_tokens=40, **fields).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a" * 40, "length")


@pytest.mark.parametrize("length", [1, 3])
def test_a_grammar_beyond_the_row_limit(length: int, server: Served) -> None:
    """With 1,000 optional properties, the first token can be written, and no more."""
    answer = post(server, max_tokens=length, **schema_body(optional_strings(1000)))
    if length == 1:
        assert answer.json()["choices"][0]["text"] == "{"
    else:
        assert answer.status_code == 400 and "max is 1000" in answer.json()["error"]["message"]


def test_tokens_are_consumed_without_the_lock_where_a_mask_is_slow(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "_SHORT_SECONDS", 0.0)
    text = post(server, regex="[0-9]{3}-[a-f]{2}", max_tokens=30).json()["choices"][0]["text"]
    assert len(text) == 6 and text[3] == "-"
    answer = post(server, **schema_body(optional_strings(1000)))
    assert "max is 1000" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (schema_body(optional_strings(5000)), "the JSON schema has "),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: "),
        ({"regex": "[", "grammar": "start: x"}, "grammar and regex: give only one"),
        ({"regex": "("}, "the grammar cannot be used: "),
    ],
)
def test_fields_that_are_too_much(fields: dict[str, Any], message: str, server: Served) -> None:
    answer = post(server, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)
    assert "\n" not in answer.json()["error"]["message"]


def test_masks_of_one_grammar_are_independent(server: Served) -> None:
    grammars = Grammars(server.model.tokenizer, server.model.vocab_size)
    compiled = grammars.compile(GrammarSource("regex", "ab|cd"))
    (a,), (c,), (d,) = map(server.model.tokenizer.encode_text, "acd")
    first, second = compiled.mask(), compiled.mask()
    first.accept(a)
    assert second.allowed()[[a, c]].all() and not first.allowed()[[a, c]].any()
    second.accept(c)
    assert second.allowed()[d]
    with pytest.raises(RequestError, match="the grammar cannot go on"):
        first.accept(d)
    with pytest.raises(RequestError, match="the grammar cannot go on"):
        first.allowed()
    assert compiled.mask().allowed()[c]
