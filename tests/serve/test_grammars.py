"""Grammars of requests: compiled once, beside everything else; an error where they are too much."""

import asyncio
import threading
from functools import partial
from typing import Any

import pytest

from rgexport.chat.jobs import Busy
from rgexport.errors import RequestError
from rgexport.serve import grammar as grammar_module
from rgexport.serve.compiling import Compiler
from rgexport.serve.exchange import Gone
from rgexport.serve.grammar import Grammars, GrammarSource
from tests.serve.conftest import COMPLETE, error_of, get, send
from tests.serve.conftest import post as post_to

AMBIGUOUS = 'start: s\ns: s s | s s s | "a" | '
LETTERS = [chr(i) for i in range(ord("A"), ord("z")) if chr(i).isalnum()]
RULES = "x: " + " | ".join(f'"{c}" e' for c in LETTERS) + '\ne: | "0"\n'
RULES += "".join(f'r{i}: x x x x t{i}\nt{i}: "{i}"\n' for i in range(50))
MANY = " | ".join(f"r{i}" for i in range(50))
"""Many items for one mask: 50 rules after each of four letters."""


@pytest.fixture
def few_items(monkeypatch):
    """So few that a small grammar has more, and a large one need not be computed."""
    limits = grammar_module._LIMITS | {"step_max_items": 1000}
    monkeypatch.setattr(grammar_module, "_LIMITS", limits)


def schema_of(properties: int, **more: Any) -> dict[str, Any]:
    """An answer in JSON with so many optional strings."""
    names = {f"property {i}": {"type": "string"} | more for i in range(properties)}
    named = {"name": "x", "schema": {"type": "object", "properties": names}}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def post(server, **fields: Any):
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0} | fields
    return post_to(server, COMPLETE, body)


class Gate:
    """Counts the grammars that are compiled, and lets none pass before it is opened."""

    def __init__(self, compile):
        self.open, self.reached = threading.Event(), threading.Event()
        self.texts: list[str] = []
        self._compile = compile

    def __call__(self, grammars: Grammars, source: GrammarSource) -> Any:
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
            answer = post(server, prompt=["hello", "the"], n=3, max_tokens=1, **schema_of(2))
            assert len(answer.json()["choices"]) == 6
        assert len(gate.texts) == 1
        assert post(server, regex="[ab]+").status_code == 200 and len(gate.texts) == 2
        messages = [error_of(post(server, grammar="start: nothing")) for _ in range(2)]
    assert len(gate.texts) == 3 and messages[0] == messages[1], "an error is known, too"
    assert "the grammar cannot be used" in messages[0] and "nothing" in messages[0]


def test_known_grammars_are_bounded(server, monkeypatch):
    monkeypatch.setattr(grammar_module, "_MOST_KNOWN", 3)
    grammars = Grammars(server.model.tokenizer, server.model.vocab_size)
    sources = [GrammarSource("regex", "a" * (1 + i)) for i in range(5)]
    for i, source in enumerate(sources):
        if i == 3:
            grammars.known(sources[0])
        grammars.compile(source)
    assert [grammars.known(source) is not None for source in sources] == [1, 0, 0, 1, 1]


def test_a_burst_of_grammars_stops_nobody(serve, gate):
    """40 clients send a grammar and leave: others are served, and what waits is not compiled."""
    with serve() as server:
        for i in range(40):
            pattern = schema_of(100, pattern=f"^[a-z]{{3,{9 + i}}}$")
            with send(server, COMPLETE, {"prompt": ["a"] * 64, "n": 4} | pattern):
                assert gate.reached.wait(60)
        assert get(server, "/health").status_code == 200
        assert post(server).status_code == 200
        assert post_to(server, "/tokenize", {"content": "a"}).status_code == 200
        gate.open.set()
        assert post(server, regex="[ab]+").status_code == 200
        assert len(gate.texts) == 2


class FakeGrammars(Gate):
    """Knows no grammar, and compiles none."""

    def __init__(self) -> None:
        super().__init__(lambda _, source: source.text)

    def known(self, source: GrammarSource) -> None:
        return None

    def compile(self, source: GrammarSource) -> Any:
        return self(None, source)


async def forever() -> None:
    await asyncio.Event().wait()


def compiling(compiler: Compiler, grammars: Any, text: str, left: Any = forever) -> Any:
    source = GrammarSource("regex", text)
    return asyncio.create_task(compiler.compile(grammars, source, left))


def test_who_left_is_skipped():
    async def scenario() -> None:
        compiler, grammars, left = Compiler(60), FakeGrammars(), asyncio.Event()
        gone = [compiling(compiler, grammars, text, left.wait) for text in "ab"]
        third = compiling(compiler, grammars, "c")
        await asyncio.to_thread(grammars.reached.wait, 60)
        left.set()
        for each in gone:
            with pytest.raises(Gone):
                await each
        grammars.open.set()
        assert await third == "c" and grammars.texts == ["a", "c"]
        compiler.close()

    asyncio.run(scenario())


def test_a_grammar_has_its_time_to_compile():
    async def scenario() -> None:
        compiler, grammars = Compiler(seconds=0.1, most=2), FakeGrammars()
        waiting = [compiling(compiler, grammars, text) for text in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="2 grammars wait to be compiled"):
            await compiling(compiler, grammars, "c")
        first, second = await asyncio.gather(*waiting, return_exceptions=True)
        assert "takes longer than 0.1 s to compile; use a simpler grammar" in str(first)
        assert isinstance(second, Busy) and "other grammars took 0.1 s" in str(second)
        grammars.open.set()
        compiler.close()
        assert grammars.texts == ["a"]

    asyncio.run(scenario())


@pytest.mark.usefixtures("few_items")
@pytest.mark.parametrize(
    ("start", "stream", "status"),
    [
        (f"start: {MANY}\n", 0, 400),
        (f'start: "q" r\nr: {MANY}\n', 0, 400),
        (f'start: "q" r\nr: {MANY}\n', 1, 200),
    ],
    ids=["at once", "later", "in a stream"],
)
def test_a_grammar_beyond_the_limits_is_an_error(start, stream, status, serve):
    with serve() as server:
        answer = post(server, grammar=start + RULES, stream=bool(stream))
    assert answer.status_code == status
    assert "Too many items (limit 1000" in answer.text and '"stop"' not in answer.text
    if stream:
        assert answer.text.rstrip().split("\n\n")[-1].startswith('data: {"error"')


def test_an_ambiguous_grammar_fits_its_grammar(server):
    (token,) = server.model.tokenizer.encode_text("a")
    fields = {"grammar": AMBIGUOUS, "logit_bias": {str(token): 100}}
    (choice,) = post(server, max_tokens=40, **fields).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a" * 40, "length")


@pytest.mark.parametrize("short_seconds", [grammar_module._SHORT_SECONDS, 0.0])
def test_a_grammar_beyond_the_row_limit(short_seconds, server, monkeypatch):
    """With 1,000 optional properties, the first token can be written, and no more.

    Where a mask is slow, tokens are consumed without the lock.
    """
    monkeypatch.setattr(grammar_module, "_SHORT_SECONDS", short_seconds)
    text = post(server, regex="[0-9]{3}-[a-f]{2}", max_tokens=30).json()["choices"][0]["text"]
    assert len(text) == 6 and text[3] == "-"
    answer = post(server, max_tokens=1, **schema_of(1000))
    assert answer.json()["choices"][0]["text"] == "{"
    assert "max is 1000" in error_of(post(server, **schema_of(1000)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (schema_of(5000), "the JSON schema has "),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: "),
        ({"regex": "[", "grammar": "start: x"}, "grammar and regex: give only one"),
        ({"regex": "("}, "the grammar cannot be used: "),
    ],
)
def test_fields_that_are_too_much(fields, message, server):
    error = error_of(post(server, **fields))
    assert error.startswith(message) and "\n" not in error


def test_masks_of_one_grammar_are_independent(server):
    grammars = Grammars(server.model.tokenizer, server.model.vocab_size)
    compiled = grammars.compile(GrammarSource("regex", "ab|cd"))
    (a,), (c,), (d,) = map(server.model.tokenizer.encode_text, "acd")
    first, second = compiled.mask(), compiled.mask()
    first.accept(a)
    assert second.allowed()[[a, c]].all() and not first.allowed()[[a, c]].any()
    second.accept(c)
    assert second.allowed()[d]
    for refused in (partial(first.accept, d), first.allowed):
        with pytest.raises(RequestError, match="the grammar cannot go on"):
            refused()
    assert compiled.mask().allowed()[c]
