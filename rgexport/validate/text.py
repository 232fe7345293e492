"""The token ids that an artifact is judged on."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.sample_text import built_in_text
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact

MAX_TOKENS = 4096
"""Default limit: two windows of a 2B."""
PAST_WINDOW = 128
"""The built-in text goes on for at least this many tokens after the first window."""
SEED = 20240411
_LONGEST_TOKEN = 32
"""Characters per token, at most, when a long file is cut before it is encoded."""


@dataclass(frozen=True)
class Text:
    """Token ids [T] int64 to be taken in one pass, and where they come from.

    `bytes` is the UTF-8 length of the text after the bos, None for random ids.
    """

    name: str
    tokens: np.ndarray
    bytes: int | None
    truncated: bool = False


def choose_text(
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    window: int,
    file: Path | None = None,
    limit: int | None = None,
) -> Text:
    """Encodes a file or the built-in text, or draws random ids if there is no tokenizer.

    A file is cut at `limit` tokens, by default at `MAX_TOKENS`. The others have `limit` tokens, by
    default more than a window.

    Raises:
        RequestError: a file that cannot be read, is empty or cannot be encoded, or a limit that
            leaves nothing to compare.
    """
    if limit is not None and limit < 2:
        raise RequestError(f"{limit} tokens are too few to compare; expected at least 2")
    if tokenizer is None:
        if file is not None:
            raise RequestError(
                f"the artifact has no tokenizer to read {file} with; leave the text out to use "
                "random token ids, or export again from a folder with a tokenizer"
            )
        return random_text(vocab_size, limit or min(MAX_TOKENS, max(64, 4 * window + 1)))
    if file is not None:
        content, most = _read(file), limit or MAX_TOKENS
        text = encode(tokenizer.encode_text, tokenizer.bos_id, content, str(file), most)
    else:
        encoder, content = tokenizer.encode_markup, built_in_text()
        once, most = len(encoder(content)), limit or window + PAST_WINDOW
        if limit is None and most <= once:
            most = MAX_TOKENS
        else:
            content *= -(-most // once)
        text = encode(encoder, tokenizer.bos_id, content, "built-in", most)
    if text.tokens.max() >= vocab_size:
        raise RequestError(
            f"the tokenizer gives the id {text.tokens.max()} but the model has {vocab_size} "
            "tokens; put the model's own tokenizer into its folder and export again"
        )
    return text


def first_tokens(artifact: Artifact, count: int) -> np.ndarray:
    """The built-in text's first tokens, [count] int64, or random ones; repeated if it is short."""
    manifest = artifact.manifest
    text = choose_text(
        open_tokenizer(artifact) if manifest.has_tokenizer else None,
        vocab_size=manifest.config.vocab_size,
        window=manifest.config.window,
        limit=count,
    )
    return np.resize(text.tokens, count)


def random_text(vocab_size: int, length: int) -> Text:
    """Draws ids uniformly, the same ones every time."""
    tokens = np.random.default_rng(SEED).integers(0, vocab_size, length, np.int64)
    return Text("random token ids", tokens, None)


def encode(
    encoder: Callable[[str], list[int]], bos_id: int | None, text: str, name: str, limit: int
) -> Text:
    """A bos and the text, cut after a character so that there are at most `limit` tokens."""
    start = [] if bos_id is None else [bos_id]

    def tokens_of(characters: int) -> int:
        return len(start) + len(encoder(text[:characters]))

    whole = len(text)
    text = text[: _LONGEST_TOKEN * limit]
    end = len(text)
    if tokens_of(end) > limit:
        end = bisect.bisect_right(range(end), limit, key=tokens_of) - 1
        while tokens_of(end) > limit:  # a longer text may have fewer tokens
            end -= 1
    ids = np.array(start + encoder(text[:end]), np.int64)
    return Text(name, ids, len(text[:end].encode()), end < whole)


def _read(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {file} as UTF-8 text: {error}") from None
    if not text.strip():
        raise RequestError(f"{file} has no text in it; expected a UTF-8 text to validate on")
    return text
