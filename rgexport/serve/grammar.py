"""Grammars of replies: JSON schemas, grammars and regular expressions, by llguidance."""

import asyncio
import functools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import llguidance.numpy
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from starlette.requests import Request

from rgexport.chat.jobs import Busy
from rgexport.chat.masks import DaemonExecutor
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError, one_line
from rgexport.serve.exchange import until_done

_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""JSON has no blanks: a model might write them for ever."""
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 20_000,
    "max_items_in_row": 1000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
"""Below llguidance's defaults, so that a grammar compiles in about a second, a mask takes at most
two, and the states of a grammar take up to 250 MB."""
_MOST_SCHEMA_CHARACTERS = 150_000  # OpenAI allows 120,000 in the names and values of a schema
_MOST_KNOWN = 16
_SHORT_SECONDS = 0.001  # after a slower mask, tokens are consumed without the interpreter's lock
COMPILE_SECONDS, MOST_COMPILING = 10.0, 64
"""Longest wait for a grammar; maximum number of grammars that wait."""
_CLOSING_SECONDS = 0.2


@dataclass(frozen=True)
class GrammarSource:
    kind: Literal["json", "regex", "grammar"]
    text: str


def json_source(schema: dict[str, Any] | None = None) -> GrammarSource:
    """Returns the grammar of JSON that fits a schema, or of any object."""
    text = json.dumps(({"type": "object"} if schema is None else schema) | _COMPACT)
    if len(text) > _MOST_SCHEMA_CHARACTERS:
        raise RequestError(
            f"the JSON schema has {len(text)} characters, more than {_MOST_SCHEMA_CHARACTERS}"
        )
    return GrammarSource("json", text)


class GrammarMask:
    """The mask of one reply; it copies matchers at the `start` of a grammar, and in an error state.

    The second one only fills a call that takes two matchers. `size` is the number of logits.
    """

    def __init__(
        self, start: llguidance.LLMatcher, failed: llguidance.LLMatcher, size: int
    ) -> None:
        self._start, self._error, self._size = start, failed, size
        self._seconds = 0.0

    # The copies are made by the thread that computes masks, when it is the reply's turn.
    @functools.cached_property
    def _matcher(self) -> llguidance.LLMatcher:
        return self._start.deep_copy()

    @functools.cached_property
    def _failed(self) -> llguidance.LLMatcher:
        return self._error.deep_copy()

    @functools.cached_property
    def _bits(self) -> np.ndarray:
        return np.zeros((1, -(-self._size // 32)), np.int32)

    def allowed(self) -> np.ndarray:
        started = time.perf_counter()
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._seconds = time.perf_counter() - started
        self._require_no_error()  # in an error state it allows only the end
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._size].view(bool)

    def accept(self, token: int) -> None:
        if self._seconds < _SHORT_SECONDS:
            self._matcher.consume_token(token)
        else:  # only a call for two matchers releases the lock of the interpreter
            _threads.executor.consume_token_par([(self._matcher, token), (self._failed, token)])
        self._require_no_error()

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"the grammar cannot go on: {reason}")


CompiledGrammar = Callable[[], GrammarMask]
"""Makes the mask of a reply."""


class Grammars:
    """The compiled grammars of one vocabulary, of `vocab_size` logits; any thread may use them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._size = tokenizer, vocab_size
        self._known: OrderedDict[GrammarSource, Future[CompiledGrammar]] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, source: GrammarSource) -> CompiledGrammar | None:
        """Returns a cached grammar, None if it is new; raises RequestError again if it failed."""
        with self._lock:
            if source not in self._known:
                return None
            self._known.move_to_end(source)
            compiled = self._known[source]
        if error := compiled.exception():
            raise RequestError(str(error))  # a new one, since an error keeps all frames it was in
        return compiled.result()

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        if known := self.known(source):
            return known
        compiled = Future[CompiledGrammar]()
        try:
            compiled.set_result(self._compiled(source))
        except RequestError as error:
            compiled.set_exception(error)
        with self._lock:
            self._known[source] = compiled
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return compiled.result()

    def _compiled(self, source: GrammarSource) -> CompiledGrammar:
        vocabulary = self._vocabulary
        try:
            limits, grammar = llguidance.LLParserLimits(**_LIMITS), _guidance(source)
            matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        except Exception as error:  # it raises ValueError, TypeError and its own
            raise RequestError(f"the grammar cannot be used: {one_line(str(error))}") from None
        if matcher.is_error():
            reason = one_line(matcher.get_error().replace("<non-verbose/>", ""))
            raise RequestError(f"the grammar cannot be used: {reason}")
        compiled = partial(GrammarMask, matcher, self._failed, self._size)
        compiled().allowed()  # a grammar beyond the limits fails at its first mask
        return compiled

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        """Llguidance's vocabulary; seconds for 256,000 tokens, once."""
        vocabulary = _GuidanceVocabulary(self._tokenizer, self._size)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))

    @functools.cached_property
    def _failed(self) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._vocabulary, "no grammar", log_level=0)


class GrammarThread:
    """One thread that compiles grammars in turn; few wait, and not for long."""

    def __init__(self) -> None:
        self._thread = DaemonExecutor("grammars", low_priority=True)
        self._waiting = 0

    async def compile(
        self, grammars: Grammars, source: GrammarSource, request: Request
    ) -> CompiledGrammar:
        """Returns the compiled grammar.

        Raises Busy if too many grammars wait or take long, Gone if the client left, RequestError
        for a grammar that cannot be used.
        """
        if compiled := grammars.known(source):
            return compiled
        if self._waiting >= MOST_COMPILING:
            raise Busy(f"{self._waiting} grammars wait to be compiled; try again later")
        self._waiting += 1
        call = self._thread.submit(partial(grammars.compile, source))
        result = asyncio.wrap_future(call)
        try:
            await until_done(result, request, COMPILE_SECONDS)
            if result.done():
                return result.result()
            if call.cancel():
                raise Busy(f"other grammars took {COMPILE_SECONDS:g} s to compile; try again later")
            raise RequestError(
                f"the grammar takes longer than {COMPILE_SECONDS:g} s to compile; use a simpler one"
            )
        finally:
            self._waiting -= 1
            result.cancel()  # skips a call that has not begun

    def close(self) -> None:
        self._thread.shutdown(_CLOSING_SECONDS)


def _guidance(source: GrammarSource) -> str:
    matcher = llguidance.LLMatcher
    if source.kind == "json":
        return str(matcher.grammar_from_json_schema(source.text))
    if source.kind == "regex":
        return str(matcher.grammar_from_regex(source.text))
    return str(matcher.grammar_from_lark(any_to_lark(source.text)))


class _Threads(threading.local):
    @functools.cached_property
    def executor(self) -> llguidance.LLExecutor:
        """The executor of this thread, which has the priority of the thread."""
        return llguidance.LLExecutor(1)


_threads = _Threads()


class _GuidanceVocabulary:
    """A vocabulary with the names that llguidance's `TokenizerWrapper` reads."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        special = set(tokenizer.special.values()) - {tokenizer.unknown_id}
        stop = tokenizer.end_of_turn_id
        self.eos_token_id = tokenizer.eos_id if stop is None else stop
        self.bos_token_id, self.unk_token_id = tokenizer.bos_id, tokenizer.unknown_id
        self.special_token_ids = sorted(special)
        self.tokens = [b"" if i in special else tokenizer.surface(i) for i in range(size)]
        self._encode = tokenizer.encode_text

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
