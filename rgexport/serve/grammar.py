"""Replies that fit a JSON schema, a grammar or a regular expression, by llguidance.

Its masks take 0.01 ms of a step at a vocabulary of 256,000 (`python -m bench.grammar`).
"""

import functools
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import NotInstalled, RequestError

if TYPE_CHECKING:
    import llguidance

_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""Without it a model may write blanks for ever."""


class Grammar:
    """What is allowed next: the mask of one reply."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._matcher, self._size = matcher, vocab_size
        words = -(-vocab_size // 32)
        self._bits = np.zeros((1, words), np.int32)

    def allowed(self) -> np.ndarray:
        """Bool [vocab]."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        found: np.ndarray = bits[: self._size].astype(bool)
        return found

    def accept(self, token: int) -> None:
        """Takes the token that was chosen.

        Raises:
            RequestError: the grammar is too much for llguidance.
        """
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise RequestError(f"the grammar cannot go on: {self._matcher.get_error()}")


class Grammars:
    """Makes masks for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Takes the vocabulary, and the number of a model's logits."""
        self._tokenizer, self._size = tokenizer, vocab_size

    def json(self, schema: dict[str, Any] | None = None) -> Grammar:
        """Replies that are JSON, and fit a schema if there is one.

        Raises:
            RequestError: the schema cannot be used.
        """
        schema = {"type": "object"} if schema is None else schema
        matcher = self._guide().LLMatcher
        return self._made(matcher.grammar_from_json_schema, json.dumps(schema | _COMPACT))

    def regex(self, expression: str) -> Grammar:
        """Replies that fit a regular expression.

        Raises:
            RequestError: it cannot be used.
        """
        return self._made(self._guide().LLMatcher.grammar_from_regex, expression)

    def grammar(self, text: str) -> Grammar:
        """Replies that fit a grammar in Lark's form, or in llama.cpp's (GBNF).

        Raises:
            RequestError: it cannot be used.
        """
        guide = self._guide()
        from llguidance.gbnf_to_lark import any_to_lark

        return self._made(lambda g: guide.LLMatcher.grammar_from_lark(any_to_lark(g)), text)

    def _made(self, read: Any, source: str) -> Grammar:
        guide, vocabulary = self._guide(), self._vocabulary
        try:
            matcher = guide.LLMatcher(vocabulary, read(source), log_level=0)
        except Exception as error:  # it raises ValueError, TypeError and its own
            raise RequestError(f"the grammar cannot be used: {error}") from None
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {matcher.get_error()}")
        return Grammar(matcher, self._size)

    @staticmethod
    def _guide() -> Any:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise NotInstalled(
                "grammars and JSON schemas need llguidance: pip install 'rgexport[serve]'"
            ) from None
        return llguidance

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The vocabulary as llguidance sees it; seconds for 256,000 tokens, once."""
        guide, tokenizer = self._guide(), self._tokenizer
        return guide.LLTokenizer(guide.TokenizerWrapper(_Vocabulary(tokenizer, self._size)))


class _Vocabulary:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

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
