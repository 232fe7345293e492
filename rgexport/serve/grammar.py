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
from rgexport.serve.disconnects import until_done

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

_MOST_SCHEMA_CHARACTERS = 150_000
"""OpenAI allows 120,000 in the names and values of a schema."""

_MOST_KNOWN = 16
"""Compiled grammars that are kept for each model."""

_SHORT_SECONDS = 0.001
"""After a slower mask, tokens are consumed without the interpreter's lock."""

COMPILE_SECONDS = 10.0
"""Longest wait for a grammar."""

MOST_COMPILING = 64
"""Maximum number of grammars that wait to be compiled."""

_CLOSING_SECONDS = 0.2
"""Longest wait for the thread at the server's end; it may hang in a grammar."""


@dataclass(frozen=True)
class GrammarSource:
    """The text of a grammar; the kind `grammar` is GBNF or Lark."""

    kind: Literal["json", "regex", "grammar"]
    text: str


def json_source(schema: dict[str, Any] | None = None) -> GrammarSource:
    """Returns the grammar of JSON that fits a schema, or of any object.

    Raises RequestError if the schema is too long.
    """
    if schema is None:
        schema = {"type": "object"}
    text = json.dumps(schema | _COMPACT)
    if len(text) > _MOST_SCHEMA_CHARACTERS:
        raise RequestError(
            f"the JSON schema has {len(text)} characters, more than {_MOST_SCHEMA_CHARACTERS}"
        )
    return GrammarSource("json", text)


class GrammarMask:
    """The mask of one reply; a `chat.masks.Mask`.

    One thread at a time calls its methods. Any thread may create it.
    """

    def __init__(
        self, start: llguidance.LLMatcher, failed: llguidance.LLMatcher, size: int
    ) -> None:
        """Takes matchers to copy: at the start of a grammar, and in an error state.

        The second one only fills a call that takes two matchers. `size` is the number of logits.
        """
        self._start = start
        self._error = failed
        self._size = size
        self._mask_seconds = 0.0

    # The copies are made by the thread that computes masks, when it is the reply's turn.
    @functools.cached_property
    def _matcher(self) -> llguidance.LLMatcher:
        return self._start.deep_copy()

    @functools.cached_property
    def _failed(self) -> llguidance.LLMatcher:
        return self._error.deep_copy()

    @functools.cached_property
    def _bits(self) -> np.ndarray:
        """One bit for each logit, as int32 [1, N]."""
        words = -(-self._size // 32)
        return np.zeros((1, words), np.int32)

    def allowed(self) -> np.ndarray:
        """Returns which tokens may come next, bool [size]; raises RequestError as `accept` does."""
        started = time.perf_counter()
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._mask_seconds = time.perf_counter() - started

        self._require_no_error()  # in an error state it allows only the end
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._size].view(bool)

    def accept(self, token: int) -> None:
        """Takes the next token of the reply; raises RequestError if the grammar cannot go on."""
        if self._mask_seconds < _SHORT_SECONDS:
            self._matcher.consume_token(token)
        else:
            # Only a call for two matchers releases the interpreter's lock.
            tokens = [(self._matcher, token), (self._failed, token)]
            _thread_local.executor.consume_token_par(tokens)
        self._require_no_error()

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"the grammar cannot go on: {reason}")


CompiledGrammar = Callable[[], GrammarMask]
"""Makes the mask of a reply."""


class Grammars:
    """The last compiled grammars of one vocabulary.

    Any thread may call its methods. Two that compile the same grammar at once both do the work.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Takes the vocabulary, and its number of logits."""
        self._tokenizer = tokenizer
        self._size = vocab_size
        self._known: OrderedDict[GrammarSource, Future[CompiledGrammar]] = OrderedDict()
        """Grammars that compiled or failed, the last used one at the end."""
        self._lock = threading.Lock()

    def known(self, source: GrammarSource) -> CompiledGrammar | None:
        """Returns a cached grammar, None if it is new; raises RequestError again if it failed."""
        with self._lock:
            if source not in self._known:
                return None
            self._known.move_to_end(source)
            compiled = self._known[source]
        error = compiled.exception()
        if error:
            raise RequestError(str(error))  # a new one, since an error keeps all frames it was in
        return compiled.result()

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Returns the compiled grammar; raises RequestError for one that cannot be used."""
        known = self.known(source)
        if known:
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
            limits = llguidance.LLParserLimits(**_LIMITS)
            grammar = _guidance_grammar(source)
            matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        except Exception as error:  # it raises ValueError, TypeError and its own
            raise RequestError(f"the grammar cannot be used: {one_line(str(error))}") from None
        if matcher.is_error():
            reason = matcher.get_error().replace("<non-verbose/>", "")
            raise RequestError(f"the grammar cannot be used: {one_line(reason)}")

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
        """A matcher in an error state."""
        return llguidance.LLMatcher(self._vocabulary, "no grammar", log_level=0)


class GrammarThread:
    """One thread that compiles grammars in turn; few wait, and not for long.

    The event loop's thread calls its methods.
    """

    def __init__(self) -> None:
        self._thread = DaemonExecutor("grammars", low_priority=True)
        self._waiting = 0

    async def compile(
        self, grammars: Grammars, source: GrammarSource, request: Request
    ) -> CompiledGrammar:
        """Returns the compiled grammar.

        Raises:
            Busy: too many grammars wait, or others take long.
            Gone: the client left.
            RequestError: the grammar takes long, or cannot be used.
        """
        known = grammars.known(source)
        if known:
            return known
        if self._waiting >= MOST_COMPILING:
            raise Busy(f"{self._waiting} grammars wait to be compiled; try again later")

        self._waiting += 1
        call = self._thread.submit(partial(grammars.compile, source))
        result = asyncio.wrap_future(call)
        try:
            await until_done(result, request, COMPILE_SECONDS)
            if result.done():
                return result.result()
            if call.cancel():  # it had not begun
                raise Busy(f"other grammars took {COMPILE_SECONDS:g} s to compile; try again later")
            raise RequestError(
                f"the grammar takes longer than {COMPILE_SECONDS:g} s to compile; use a simpler one"
            )
        finally:
            self._waiting -= 1
            result.cancel()  # skips a call that has not begun

    def close(self) -> None:
        """Ends the thread; one that hangs in a grammar is left to the end of the process."""
        self._thread.shutdown(_CLOSING_SECONDS)


def _guidance_grammar(source: GrammarSource) -> str:
    """Returns a grammar in llguidance's own form."""
    matcher = llguidance.LLMatcher
    if source.kind == "json":
        return str(matcher.grammar_from_json_schema(source.text))
    if source.kind == "regex":
        return str(matcher.grammar_from_regex(source.text))
    return str(matcher.grammar_from_lark(any_to_lark(source.text)))


class _ThreadLocal(threading.local):
    @functools.cached_property
    def executor(self) -> llguidance.LLExecutor:
        """The executor of this thread, which has the priority of the thread."""
        return llguidance.LLExecutor(1)


_thread_local = _ThreadLocal()


class _GuidanceVocabulary:
    """A vocabulary with the names that llguidance's `TokenizerWrapper` reads."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        special = set(tokenizer.special.values()) - {tokenizer.unknown_id}
        self.eos_token_id = tokenizer.end_of_turn_id
        if self.eos_token_id is None:
            self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.unk_token_id = tokenizer.unknown_id
        self.special_token_ids = sorted(special)
        self.tokens: list[bytes] = []
        for token in range(size):
            if token in special:
                self.tokens.append(b"")  # no text of a grammar allows it
            else:
                self.tokens.append(tokenizer.surface(token))
        self._encode = tokenizer.encode_text

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._encode(text)
