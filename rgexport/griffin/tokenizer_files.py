"""The tokenizer's files in a model folder, and their contents, checked before they are used.

The library `tokenizers` runs what a `tokenizer.json` says: a chain of replacements can make a
thousand texts of one, a regular expression can take any time, and some end in a panic, which is no
`Exception`.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgexport.errors import RequestError, reason
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json

if TYPE_CHECKING:
    import tokenizers

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""The vocabulary; one of them is enough."""
TOKENIZER_CONFIG = "tokenizer_config.json"
"""Settings, such as the names of control tokens and the chat template."""
TOKENIZER_FILES = (
    *TOKENIZERS,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces (sentencepiece_model.proto), with the same numbers in llama.cpp."""
BPE = 2
"""`TrainerSpec.ModelType`."""
MAX_BYTES = 256 << 20
"""Largest file of a vocabulary: Gemma's has 4 MB, or 33 MB as JSON."""


def find_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has a vocabulary, not only its settings."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def read_pieces(path: Path) -> Any:
    """Returns the `ModelProto` of a file; any error of protobuf may be raised."""
    # slow to import, and generated without type information
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto.FromString(read_regular(path, MAX_BYTES))


def is_gemmas_kind(model: Any) -> bool:
    """Returns whether it is a BPE model with byte fallback that writes spaces as "▁"."""
    trainer = model.trainer_spec
    is_bpe = trainer.model_type == BPE and trainer.byte_fallback
    return bool(is_bpe and model.normalizer_spec.escape_whitespaces)


def normalization(model: Any) -> str | None:
    """Returns the name of the rule by which a model changes text before it splits it."""
    spec = model.normalizer_spec
    if not (spec.precompiled_charsmap or spec.remove_extra_whitespaces):
        return None
    return spec.name or "whitespace"


_MOST_STEPS = 16  # steps of a normalizer, a pre-tokenizer or a decoder: Gemma's have one to three
_MOST_TEXT, _MOST_TOKEN = 64, 1024  # characters that a step looks for or inserts, of an added token
_MOST_ADDED = 1 << 16  # added tokens; Gemma 3 has 6,415
_MOST_GROWTH = 16  # how many times as long a text may become; spaces become three bytes each
_SIMPLE = re.compile(r"(\\[sSdDwW]|[^\\\[\](){}|*+?^$.])([+*]|\{\d{1,2},?\d{0,2}\})?")
"""A regular expression of one character and one quantifier: it takes linear time."""

_COMPONENTS = {
    "normalizer": "Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Sequence Strip "
    "StripAccents",
    "pre_tokenizer": "Digits Metaspace Punctuation Sequence Split Whitespace WhitespaceSplit",
    "decoder": "ByteFallback Fuse Metaspace Replace Sequence Strip",
    "post_processor": "ByteLevel RobertaProcessing BertProcessing Sequence TemplateProcessing",
}
"""Field → types of its steps."""
_PARTS = {"normalizers", "pretokenizers", "decoders", "processors"}  # fields of a sequence


@dataclass(frozen=True)
class TokenizerJson:
    path: Path
    content: bytes
    fields: dict[str, Any]

    def engine(self) -> "tokenizers.Tokenizer":
        """Opens the file in the library `tokenizers`."""
        import tokenizers

        with guarded(self.path):
            return tokenizers.Tokenizer.from_buffer(self.content)


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Reads a file; RequestError for a step that is not allowed, ValueError for loose JSON."""
    content = read_regular(path, MAX_BYTES)
    fields = parse_json(content)
    for complaint in _complaints(fields):
        raise RequestError(
            f"{path} is not a readable tokenizer ({complaint}); copy it again from the original "
            "checkpoint, or put tokenizer.model beside it"
        )
    return TokenizerJson(path, content, fields)


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turns what a library raises because of its file, even a panic, into a RequestError."""
    try:
        yield
    except RequestError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise RequestError(
            f"{path} is not a readable tokenizer ({reason(error)}); "
            "copy it again from the original checkpoint"
        ) from None


def _complaints(fields: Any) -> Iterator[str]:
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        yield "it has no object `model`"
        return
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        yield from _long(f"model.{name}", fields["model"].get(name), _MOST_TOKEN)
    for field, types in _COMPONENTS.items():
        yield from _wrong_steps(field, fields.get(field), types.split())
    added = fields.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > _MOST_ADDED:
        yield f"added_tokens is no list of at most {_MOST_ADDED}"
        return
    for token in added:
        yield from _long("added_tokens.content", _text(token, "content"), _MOST_TOKEN)


def _wrong_steps(field: str, value: Any, types: list[str]) -> Iterator[str]:
    steps: list[dict[str, Any]] = []
    waiting = [value] if value is not None else []
    while waiting and len(steps) <= _MOST_STEPS:
        step = waiting.pop()
        if not isinstance(step, dict) or step.get("type") not in types:
            kind = step.get("type") if isinstance(step, dict) else step
            yield f"{field} has a step {kind!r:.40}; expected one of {', '.join(types)}"
            return
        steps.append(step)
        for name in _PARTS & step.keys():
            waiting += step[name] if isinstance(step[name], list) else [step[name]]
    if len(steps) > _MOST_STEPS:
        yield f"{field} has more than {_MOST_STEPS} steps"
        return
    growth = 1.0
    for step in steps:
        for name in ("content", "prepend", "replacement"):
            yield from _long(f"{field}.{name}", _text(step, name), _MOST_TEXT)
        yield from _wrong_pattern(f"{field}.pattern", step.get("pattern"))
        growth *= _growth(step)
    if growth > _MOST_GROWTH:
        yield f"{field} makes a text more than {_MOST_GROWTH} times as long"


def _wrong_pattern(label: str, pattern: Any) -> Iterator[str]:
    if pattern is None:
        return
    text = _text(pattern, "String") if isinstance(pattern, dict) else pattern
    expression = _text(pattern, "Regex")
    if expression is not None and not _SIMPLE.fullmatch(str(expression)):
        yield f"{label} is the regular expression {expression!r:.40}; expected a text"
    yield from _long(label, text if expression is None else expression, _MOST_TEXT)
    if text == "" or (text is None and expression is None):
        yield f"{label} is empty"


def _growth(step: Mapping[str, Any]) -> float:
    """Returns the most times as long that a replacement makes a text, in bytes."""
    content = step.get("content")
    if step["type"] != "Replace" or not isinstance(content, str):
        return 1.0
    pattern = _text(step.get("pattern"), "String")
    looked_for = len(pattern.encode()) if isinstance(pattern, str) else 1
    return max(1.0, len(content.encode()) / max(1, looked_for))


def _text(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _long(label: str, text: Any, most: int) -> Iterator[str]:
    if text is not None and (not isinstance(text, str) or len(text) > most):
        size = f"{len(text)} characters" if isinstance(text, str) else f"{text!r:.40}"
        yield f"{label} is {size}; expected a text of at most {most}"
