"""Replies that fit a JSON schema, a grammar or a regular expression, by llguidance."""

import functools
import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import NotInstalled, RequestError, one_line

if TYPE_CHECKING:
    import llguidance

_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""Without it a model may write blanks for ever."""
_LIMITS = {
    "max_grammar_size": 20_000,
    "max_items_in_row": 1000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
"""Below llguidance's defaults, so that a grammar compiles in about a second, a mask takes a second
or two at most, and the states of a grammar take up to 250 MB."""
_MOST_SCHEMA_CHARACTERS = 150_000
"""OpenAI allows 120,000 in the names and values of a schema."""
_MOST_KNOWN = 16
"""Grammars that are kept compiled for the next request."""
_SHORT_SECONDS = 0.001
"""After a mask that took longer, tokens are consumed without the interpreter's lock."""


@dataclass(frozen=True)
class GrammarSource:
    """The text of a grammar; equal ones are compiled once."""

    kind: Literal["json", "regex", "grammar"]
    text: str


def json_source(schema: dict[str, Any] | None = None) -> GrammarSource:
    """Returns the grammar of JSON that fits a schema, or of any object.

    Raises:
        RequestError: the schema is too long.
    """
    text = json.dumps(({"type": "object"} if schema is None else schema) | _COMPACT)
    if len(text) > _MOST_SCHEMA_CHARACTERS:
        raise RequestError(
            f"the JSON schema has {len(text)} characters; "
            f"this server takes up to {_MOST_SCHEMA_CHARACTERS}"
        )
    return GrammarSource("json", text)


class Grammar:
    """The mask of one reply."""

    def __init__(
        self, matcher: "llguidance.LLMatcher", failed: "llguidance.LLMatcher", vocab_size: int
    ) -> None:
        """Takes a matcher at the start of the grammar, and one in an error state."""
        self._start, self._failed_start, self._size = matcher, failed, vocab_size
        self._seconds = 0.0

    # Copied by the thread that computes masks, when the reply has its turn.
    @functools.cached_property
    def _matcher(self) -> "llguidance.LLMatcher":
        return self._start.deep_copy()

    @functools.cached_property
    def _failed(self) -> "llguidance.LLMatcher":
        return self._failed_start.deep_copy()

    @functools.cached_property
    def _bits(self) -> np.ndarray:
        return np.zeros((1, -(-self._size // 32)), np.int32)

    def allowed(self) -> np.ndarray:
        """Returns which tokens may come next, bool [vocab].

        Raises:
            RequestError: the grammar is beyond llguidance's limits.
        """
        import llguidance.numpy

        started = time.perf_counter()
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._seconds = time.perf_counter() - started
        self._require_no_error()  # in an error state it allows the end alone
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._size].view(bool)

    def accept(self, token: int) -> None:
        """Takes the token that was chosen.

        Raises:
            RequestError: the grammar is beyond llguidance's limits.
        """
        if self._seconds < _SHORT_SECONDS:
            self._matcher.consume_token(token)
        else:  # only a call for two matchers releases the lock of the interpreter
            _executor().consume_token_par([(self._matcher, token), (self._failed, token)])
        self._require_no_error()

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"the grammar cannot go on: {reason}")


class CompiledGrammar:
    """A grammar that makes the masks of any number of replies."""

    def __init__(
        self, matcher: "llguidance.LLMatcher", failed: "llguidance.LLMatcher", vocab_size: int
    ) -> None:
        """Takes a matcher at its start, and one in an error state."""
        self._matcher, self._failed, self._size = matcher, failed, vocab_size

    def mask(self) -> Grammar:
        """Returns the mask of another reply."""
        return Grammar(self._matcher, self._failed, self._size)


class Grammars:
    """The grammars of one vocabulary; those used last are kept compiled."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Takes the vocabulary, and the number of a model's logits."""
        self._tokenizer, self._size = tokenizer, vocab_size
        self._known: OrderedDict[GrammarSource, CompiledGrammar | RequestError] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, source: GrammarSource) -> CompiledGrammar | None:
        """Returns a grammar that was compiled before.

        Raises:
            RequestError: it could not be used.
        """
        with self._lock:
            if source not in self._known:
                return None
            self._known.move_to_end(source)
            compiled = self._known[source]
        if isinstance(compiled, RequestError):
            raise RequestError(str(compiled))
        return compiled

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Returns a compiled grammar; it takes up to seconds if the grammar is new.

        Raises:
            RequestError: the grammar cannot be used.
        """
        if compiled := self.known(source):
            return compiled
        try:
            compiled = self._compiled(source)
        except NotInstalled:
            raise
        except RequestError as error:
            self._keep(source, error)
            raise
        self._keep(source, compiled)
        return compiled

    def _keep(self, source: GrammarSource, compiled: CompiledGrammar | RequestError) -> None:
        with self._lock:
            self._known[source] = compiled
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)

    def _compiled(self, source: GrammarSource) -> CompiledGrammar:
        guide, vocabulary = _llguidance(), self._vocabulary
        try:
            limits = guide.LLParserLimits(**_LIMITS)
            matcher = guide.LLMatcher(vocabulary, _guidance(source), log_level=0, limits=limits)
        except Exception as error:  # it raises ValueError, TypeError and its own
            raise RequestError(f"the grammar cannot be used: {one_line(str(error))}") from None
        if matcher.is_error():
            reason = one_line(matcher.get_error().replace("<non-verbose/>", ""))
            raise RequestError(f"the grammar cannot be used: {reason}")
        compiled = CompiledGrammar(matcher, self._failed, self._size)
        compiled.mask().allowed()
        return compiled

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The vocabulary as llguidance sees it; seconds for 256,000 tokens, once."""
        guide, tokenizer = _llguidance(), self._tokenizer
        return guide.LLTokenizer(guide.TokenizerWrapper(_Vocabulary(tokenizer, self._size)))

    @functools.cached_property
    def _failed(self) -> Any:
        return _llguidance().LLMatcher(self._vocabulary, "no grammar", log_level=0)


def _guidance(source: GrammarSource) -> str:
    """Returns a grammar in a form that llguidance reads."""
    matcher = _llguidance().LLMatcher
    if source.kind == "json":
        return str(matcher.grammar_from_json_schema(source.text))
    if source.kind == "regex":
        return str(matcher.grammar_from_regex(source.text))
    from llguidance.gbnf_to_lark import any_to_lark

    return str(matcher.grammar_from_lark(any_to_lark(source.text)))


_threads = threading.local()


def _executor() -> "llguidance.LLExecutor":
    """Returns the executor of this thread; its own thread has the same priority."""
    if not hasattr(_threads, "executor"):
        _threads.executor = _llguidance().LLExecutor(1)
    executor: llguidance.LLExecutor = _threads.executor
    return executor


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise NotInstalled(
            "grammars and JSON schemas need llguidance: pip install 'rgexport[serve]'"
        ) from None
    return llguidance


class _Vocabulary:
    """A tokenizer as `llguidance.TokenizerWrapper` asks for it."""

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
