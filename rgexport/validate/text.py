"""The texts that artifacts are judged on, and the prompts of reference files."""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.sample_text import built_in_text
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.files.typed_json import Mismatch, parse_json

MAX_TOKENS = 4096
"""Default limit: two windows of a 2B."""
PAST_WINDOW = 128
"""The built-in text goes on for at least this many tokens after the first window."""
SEED = 20240411


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
    vocab_size: int,
    window: int,
    file: Path | None = None,
    limit: int | None = None,
) -> Text:
    """Encodes a file or the built-in text, or draws random ids if there is no tokenizer.

    A file is cut at `limit` tokens, by default at `MAX_TOKENS`; the others have so many, by default
    more than a window. Raises RequestError for a file that cannot be read, is empty or not encoded.
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
        content, most = _read_utf8(file), limit or MAX_TOKENS
        if not content.strip():
            raise RequestError(f"{file} has no text in it; expected a UTF-8 text to validate on")
        text = encode(tokenizer.encode_text, tokenizer.bos_id, content, str(file), most)
    else:
        encoder, content = tokenizer.encode_markup, built_in_text()
        once, most = len(encoder(content)), limit or window + PAST_WINDOW
        if limit is None and most <= once:
            most = MAX_TOKENS
        else:
            content *= -(-most // once)
        text = encode(encoder, tokenizer.bos_id, content, "built-in", most)
    _require_known(text, vocab_size)
    return text


def _require_known(text: Text, vocab_size: int) -> None:
    if text.tokens.max() >= vocab_size:
        raise RequestError(
            f"the text {text.name!r} has the id {text.tokens.max()}, but the model has "
            f"{vocab_size} tokens; expected ids of the model's own tokenizer"
        )


def first_tokens(artifact: Artifact, count: int) -> np.ndarray:
    """The built-in text's first tokens, [count] int64, or random ones; repeated if it is short."""
    config = artifact.manifest.config
    tokenizer = open_tokenizer(artifact) if artifact.manifest.has_tokenizer else None
    text = choose_text(tokenizer, config.vocab_size, config.window, limit=count)
    return np.resize(text.tokens, count)


def random_text(vocab_size: int, length: int) -> Text:
    tokens = np.random.default_rng(SEED).integers(0, vocab_size, length, np.int64)
    return Text("random token ids", tokens, None)


def encode(
    encoder: Callable[[str], list[int]], bos_id: int | None, text: str, name: str, limit: int
) -> Text:
    """A bos and the text, cut after a character so that there are at most `limit` tokens."""
    start = [] if bos_id is None else [bos_id]

    def tokens_of(characters: int) -> int:
        return len(start) + len(encoder(text[:characters]))

    whole, text = len(text), text[: 32 * limit]  # no token is longer
    end = len(text)
    if tokens_of(end) > limit:
        end = bisect.bisect_right(range(end), limit, key=tokens_of) - 1
        while tokens_of(end) > limit:  # a longer text may have fewer tokens
            end -= 1
    ids = np.array(start + encoder(text[:end]), np.int64)
    return Text(name, ids, len(text[:end].encode()), end < whole)


def _read_utf8(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {file} as UTF-8 text: {error}") from None


_NO_LIMIT = 1 << 24  # token limit that no prompt reaches

PROMPTS: dict[str, str] = parse_json((files("rgexport.validate") / "prompts.json").read_bytes())
"""Name → built-in prompt; turn markers are special tokens in `_CHAT` alone."""
_CHAT = "chat turns"


def choose_prompts(
    tokenizer: Tokenizer | None, vocab_size: int, window: int, file: Path | None = None
) -> list[Text]:
    """The prompts of `file`, else built-in ones or random ids; RequestError for wrong ones."""
    longest = min(int(2.25 * window), 8192)
    if file is not None:
        prompts = list(_from_file(file, tokenizer))
    elif tokenizer is not None:
        prompts = list(_built_in(tokenizer, longest))
    else:
        rng, lengths = np.random.default_rng(SEED), (1, 2, 7, 32, 65, longest)
        ids = [rng.integers(0, vocab_size, length, np.int64) for length in lengths]
        prompts = [Text(f"{len(tokens)} random ids", tokens, None) for tokens in ids]
    for prompt in prompts:
        _require_known(prompt, vocab_size)
    return prompts


def short_prompts(tokenizer: Tokenizer) -> list[Text]:
    """Returns the built-in prompts that a model continues readably: prose, code and a chat."""
    return [_built_in_prompt(tokenizer, name) for name in ("prose", "code", _CHAT)]


def _built_in_prompt(tokenizer: Tokenizer, name: str) -> Text:
    encoder = tokenizer.encode_markup if name == _CHAT else tokenizer.encode_text
    return encode(encoder, tokenizer.bos_id, PROMPTS[name], name, _NO_LIMIT)


def _built_in(tokenizer: Tokenizer, longest: int) -> Iterator[Text]:
    bos = tokenizer.bos_id
    if bos is not None:
        yield Text("empty", np.array([bos], np.int64), 0)
    yield from (_built_in_prompt(tokenizer, name) for name in PROMPTS if name != _CHAT)
    one_token = _plain(tokenizer, "one token", "The").tokens[: 1 + (bos is not None)]
    yield Text("one token", one_token, len(tokenizer.decode(one_token.tolist()).encode()))
    yield _built_in_prompt(tokenizer, _CHAT)
    sample = built_in_text()
    repetitions = -(-longest // max(1, len(tokenizer.encode_markup(sample))))
    yield encode(tokenizer.encode_markup, bos, sample * repetitions, "several windows", longest)


def _plain(tokenizer: Tokenizer, name: str, text: str) -> Text:
    """Encodes a prompt; turn markers in it become ordinary text."""
    prompt = encode(tokenizer.encode_text, tokenizer.bos_id, text, name, _NO_LIMIT)
    if not len(prompt.tokens):
        raise RequestError(f"the prompt {name!r} has no tokens; give it a text")
    return prompt


def _from_file(file: Path, tokenizer: Tokenizer | None) -> Iterator[Text]:
    for number, item in enumerate(_read_items(file), 1):
        name = f"{file.name} {number}"
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            name, item = item["name"], item.get("text", item.get("ids"))
        are_ids = isinstance(item, list) and all(
            type(token) is int and 0 <= token < 1 << 31 for token in item
        )
        if isinstance(item, str):
            if tokenizer is None:
                raise RequestError(
                    f"the model has no tokenizer to read {file} with; give lists of token ids, "
                    "or leave --prompts out"
                )
            yield _plain(tokenizer, name, item)
        elif are_ids and item:
            yield Text(name, np.array(item, np.int64), None)
        else:
            raise RequestError(
                f'{file}: prompt {number} is neither a text, a list of ids, nor {{"name": …, '
                '"text" or "ids": …}'
            )


def _read_items(file: Path) -> list[Any]:
    text = _read_utf8(file)
    items: list[Any] = [line for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("["):
        try:
            items = parse_json(text)
        except Mismatch as error:
            raise RequestError(f"{file} begins as a JSON list, but is {error}") from None
    if not items:
        raise RequestError(f"{file} has no prompts; expected lines of text, or a JSON list")
    return items
