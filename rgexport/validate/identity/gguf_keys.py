"""Compares the keys by which llama.cpp makes its tokenizer with what rgexport writes."""

import reprlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rgexport.chat.artifact_text import open_template
from rgexport.chat.tokenizer import Tokenizer
from rgexport.export.gguf.artifact import GgufArtifact
from rgexport.export.gguf.vocabulary import Vocabulary
from rgexport.griffin.control_tokens import END_OF_TURN, ControlToken, ControlTokens
from rgexport.validate.identity.items import IdentityItem, compared
from rgexport.validate.identity.text import NO_MEANING, meaning

_PREFIX = "tokenizer.ggml."
_COLUMNS = tuple(f"{_PREFIX}{name}" for name in ("tokens", "scores", "token_type"))
"""The lists of a vocabulary."""
_TEMPLATE = "tokenizer.chat_template"
_MOST_NAMED, _MOST_SHOWN = 20, 80
"""Keys that differ, and characters of one, that are shown."""


def gguf_items(artifact: GgufArtifact, tokenizer: Tokenizer | None) -> dict[str, str | None]:
    """The items of a file's text side, see `text.meaning`; there are no files beside it."""
    vocabulary = _vocabulary(artifact.header.values)
    if tokenizer is None or vocabulary is None:
        return dict(NO_MEANING)
    return meaning(tokenizer, vocabulary, vocabulary.control, open_template(artifact).source)


def gguf_keys(artifact: GgufArtifact) -> Iterator[IdentityItem]:
    """Compares the keys of the tokenizer with what rgexport writes.

    The vocabulary's lists are left out: they are compared with the original's.
    """
    from rgexport.export.gguf.metadata import tokenizer_values

    values = artifact.header.values
    pairs = tokenizer_values(_vocabulary(values), values.get(_TEMPLATE))
    expected = {pair.key: pair.value for pair in pairs}
    found = {key: _plain(value) for key, value in values.items() if key.startswith("tokenizer.")}
    keys = [key for key in (*expected, *(found.keys() - expected.keys())) if key not in _COLUMNS]
    wrong = [key for key in keys if found.get(key) != expected.get(key)]
    for key in wrong[:_MOST_NAMED]:
        ours, theirs = (reprlib.repr(side.get(key)) for side in (found, expected))
        yield IdentityItem(
            name=key[:_MOST_SHOWN],
            artifact=ours,
            expected=theirs,
            outcome="differs",
            reason="its own manifest means",
        )
    if not wrong:
        count = f"{len(keys)} keys"
        yield compared("metadata", count, count, "as its own manifest means")


def _vocabulary(values: dict[str, Any]) -> Vocabulary | None:
    """The vocabulary as the file has it; scores are NaN where they are missing."""
    tokens, scores, types = (values.get(name) for name in _COLUMNS)
    if tokens is None or types is None:
        return None

    def token(name: str) -> ControlToken | None:
        index = values.get(f"{_PREFIX}{name}_token_id")
        return ControlToken(index, "") if isinstance(index, int) else None

    end_of_turn = token("eot")
    control = ControlTokens(
        bos=token("bos"),
        eos=token("eos"),
        unk=token("unknown"),
        pad=token("padding"),
        special={} if end_of_turn is None else {END_OF_TURN: end_of_turn.id},
    )
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        scores = np.full(len(tokens), np.nan)
    return Vocabulary(
        tokens=tokens,
        scores=scores,
        types=types,
        control=control,
        add_space_prefix=values.get(f"{_PREFIX}add_space_prefix") is True,
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
