"""Identity items of a model's text side: tokenizer, chat template, and settings of generation.

The items of a checkpoint are those of the folder that an export would write for it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from rgexport._version import __version__
from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.gguf.vocabulary import Vocabulary, read_vocabulary
from rgexport.chat.sample_text import built_in_text
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.tokenizer import complete_tokenizer
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.control_tokens import ControlTokens, chat_template, read_control_tokens
from rgexport.griffin.tokenizer_files import (
    MAX_BYTES,
    NORMAL,
    TOKENIZER_FILES,
    find_tokenizer_files,
    has_tokenizer,
)
from rgexport.progress import without_warnings

Items = Mapping[str, str | None]
"""Name → value in words; None where there is none."""

_HARD_TEXTS = parse_json((files("rgexport.validate") / "hard_texts.json").read_bytes())
"""Texts on which tokenizers that are nearly the same differ."""
_CONTROL = ("bos", "eos", "end_of_turn", "unknown", "padding")
"""Names of the items of control tokens."""
NO_MEANING = dict.fromkeys(("vocabulary", "tokenization", "chat_template", *_CONTROL))
"""The items of `meaning` where there is no tokenizer."""
MOST_CHARACTERS = 200
"""Longer JSON files are replaced by their hash."""
_MAX_SPLIT_LENGTH = 256
"""Characters of a piece up to which its splits are tried; the time is quadratic in the length."""


@dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """The text side of a checkpoint.

    Attributes:
        layout: Layout of the checkpoint.
        version: The version of rgexport that converted or completed the files.
        made: Names of the files that rgexport converted or completed.
        items: The items of the completed folder.
    """

    layout: str
    version: str
    made: tuple[str, ...]
    items: dict[str, str | None]


def text_identity(checkpoint: Checkpoint) -> TextIdentity:
    """Returns the text side of a checkpoint, completed as an export completes it."""
    before = {path.name: file_text(path) for path in checkpoint.tokenizer_files}

    with completed_copy(checkpoint.tokenizer_files, checkpoint.name) as (folder, _):
        tokenizer = None
        if has_tokenizer(folder):
            tokenizer = load_tokenizer(folder)
        items = folder_items(folder, checkpoint.config.vocab_size, tokenizer)

    converted = tuple(name for name in TOKENIZER_FILES if items[name] != before.get(name))
    return TextIdentity(layout=checkpoint.layout, version=__version__, made=converted, items=items)


@contextmanager
def completed_copy(files: Iterable[Path], name: str) -> Iterator[tuple[Path, ControlIds]]:
    """Copies a tokenizer's files and completes them as an export does; yields folder and ids."""
    with TemporaryDirectory() as temporary, without_warnings():
        folder = Path(temporary)
        paths = list(files)
        for path in paths:
            (folder / path.name).write_bytes(read_regular(path, MAX_BYTES))

        try:
            ids = complete_tokenizer(folder, name)
        except RequestError as error:
            # The message names a file of the copy; the user knows the original folder.
            message = str(error).replace(temporary, str(paths[0].parent))
            raise RequestError(message) from None

        yield folder, ids


def folder_items(
    folder: Path, vocab_size: int, tokenizer: Tokenizer | None
) -> dict[str, str | None]:
    """Returns the items of a folder: each of the tokenizer's files, and their `meaning`."""
    items = {name: file_text(folder / name) for name in TOKENIZER_FILES}
    if tokenizer is None:
        return items | NO_MEANING

    vocabulary = None
    # A vocabulary of a kind that only SentencePiece reads is left out.
    with without_warnings(), suppress(RequestError):
        vocabulary = read_vocabulary(find_tokenizer_files(folder), vocab_size)

    control = read_control_tokens(folder)
    template, _ = chat_template(folder)
    return items | meaning(tokenizer, vocabulary, control, template)


def meaning(
    tokenizer: Tokenizer, vocabulary: Vocabulary | None, control: ControlTokens, template: str
) -> dict[str, str | None]:
    """Returns the items that do not depend on the format of a tokenizer's files.

    They are the vocabulary's content, the ids of some texts, the template and the control ids.
    """
    pieces = None
    if vocabulary is not None:
        pieces = _vocabulary_text(vocabulary)
    return {
        "vocabulary": pieces,
        "tokenization": _tokenization_text(tokenizer),
        "chat_template": _counted(len(template), "characters", template),
        **_control_items(control),
    }


def _vocabulary_text(vocabulary: Vocabulary) -> str:
    columns = (
        vocabulary.tokens,
        vocabulary.types.tolist(),
        _merge_ranks(vocabulary),
        vocabulary.add_space_prefix,
    )
    return _counted(len(vocabulary.tokens), "pieces", json.dumps(columns))


def _tokenization_text(tokenizer: Tokenizer) -> str:
    sample = built_in_text()
    ids = [tokenizer.encode_markup(sample)]
    ids.extend(tokenizer.encode_text(text) for text in (sample, *_HARD_TEXTS))
    return _counted(sum(map(len, ids)), "tokens", json.dumps(ids))


def _control_items(control: ControlTokens) -> dict[str, str | None]:
    tokens = (
        control.bos,
        control.eos or control.end_of_turn,  # as in GGUF files
        control.end_of_turn,
        control.unk,
        control.pad,
    )
    items: dict[str, str | None] = {}
    for name, token in zip(_CONTROL, tokens, strict=True):
        items[name] = None if token is None else str(token.id)
    return items


def _merge_ranks(vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Returns the ids of merged pieces, each with the rank of its score; 0 is merged first.

    Nothing else of the scores counts, and the merges of a tokenizer.json have ranks alone. Runs of
    spaces have the score 0 in either case, as the first merge may have: they rank by themselves,
    after all others.
    """
    tokens = vocabulary.tokens
    scores = vocabulary.scores.tolist()
    merged_ids = _merged_ids(vocabulary)

    sort_keys = []
    for token_id in merged_ids:
        is_space_run = not tokens[token_id].strip("▁")
        sort_keys.append((is_space_run, -scores[token_id]))

    # Equal scores have equal ranks.
    distinct_keys = sorted(set(sort_keys))
    rank_of_key = {key: rank for rank, key in enumerate(distinct_keys)}
    ranks = [rank_of_key[key] for key in sort_keys]
    return list(zip(merged_ids, ranks, strict=True))


def _merged_ids(vocabulary: Vocabulary) -> list[int]:
    """Returns the ids of the normal pieces that consist of two other normal pieces."""
    tokens = vocabulary.tokens
    types = vocabulary.types.tolist()
    normal_ids = [token_id for token_id, kind in enumerate(types) if kind == NORMAL]
    normal_pieces = {tokens[token_id] for token_id in normal_ids}

    merged_ids = []
    for token_id in normal_ids:
        piece = tokens[token_id]
        if len(piece) > _MAX_SPLIT_LENGTH or _consists_of_two(piece, normal_pieces):
            merged_ids.append(token_id)
    return merged_ids


def _consists_of_two(piece: str, pieces: set[str]) -> bool:
    for split in range(1, len(piece)):
        if piece[:split] in pieces and piece[split:] in pieces:
            return True
    return False


def _counted(count: int, unit: str, content: str) -> str:
    # Templates and pieces of a damaged tokenizer may have lone surrogates.
    digest = content_hash(content.encode("utf-8", "surrogatepass"))
    return f"{count:,} {unit}, {digest}"


def file_text(path: Path) -> str | None:
    """Returns a short JSON file in canonical form, a hash of others, None if it is missing.

    Raises:
        RequestError: The file exists but cannot be read.
    """
    try:
        content = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None

    if path.suffix == ".json":
        with suppress(ValueError, RecursionError):
            text = json.dumps(parse_json(content), sort_keys=True)
            if len(text) <= MOST_CHARACTERS:
                return text
            return content_hash(text.encode())
    return content_hash(content)


def content_hash(content: bytes) -> str:
    """Returns the first 128 bits of a content's SHA-256, with the algorithm's name before it."""
    return f"sha256 {hashlib.sha256(content).hexdigest()[:32]}"
