"""Makes the metadata of a GGUF file, without the values that depend on its type and its data."""

import dataclasses
import json
import math
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import gguf
from gguf import GGUFValueType as Kind

from rgexport._version import __version__
from rgexport.export.gguf.integrity import MANIFEST_KEY, EmbeddedManifest
from rgexport.export.gguf.naming import ARCHITECTURE, architecture
from rgexport.export.gguf.vocabulary import Vocabulary
from rgexport.export.manifest import Source
from rgexport.export.origin import GEMMA_TERMS, folder_of, origin_of
from rgexport.files.typed_json import to_json
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import FileHashes
from rgexport.griffin.control_tokens import chosen_template
from rgexport.griffin.layout import model_tensors

_KINDS = {int: Kind.UINT32, float: Kind.FLOAT32, list: Kind.INT32}
"""Type of a value of the architecture → its kind, or that of its items."""


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """One key-value pair; `kind` is the type of the value, or of the items of a list."""

    key: str
    value: Any
    kind: Kind


def metadata(
    checkpoint: Checkpoint, hashes: FileHashes, vocabulary: Vocabulary | None
) -> list[KeyValue]:
    """Returns the pairs in the file's order; they do not depend on the file's type."""
    template = None
    if vocabulary is not None:
        special = vocabulary.control.special
        template = chosen_template(folder_of(checkpoint), special, checkpoint.name)
    return [
        *_general(checkpoint),
        *(
            KeyValue(key, value, _KINDS[type(value)])
            for key, value in architecture(checkpoint.config).items()
        ),
        *tokenizer_values(vocabulary, template),
        KeyValue(MANIFEST_KEY, json.dumps(to_json(_manifest(checkpoint, hashes))), Kind.STRING),
    ]


def _general(checkpoint: Checkpoint) -> Iterator[KeyValue]:
    count = sum(math.prod(spec.shape) for spec in model_tensors(checkpoint.config).values())
    origin = origin_of(checkpoint)
    page = origin.hub_id and f"https://huggingface.co/{origin.hub_id}"
    terms: dict[str, str | None] = {"license": origin.licence}
    if origin.released:
        names = {"license.name": "Gemma Terms of Use", "license.link": GEMMA_TERMS}
        terms = {"organization": "Google", **terms, **names}
    texts = {
        "type": "model",
        "name": checkpoint.name,
        "basename": ARCHITECTURE,
        "finetune": "it" if checkpoint.instruction_tuned else None,
        "size_label": gguf.size_label(count, count, 0, 0),
        **terms,
        "source.url": page,
        "source.huggingface.repository": origin.hub_id,
    }
    for key, text in texts.items():
        if text:
            yield KeyValue(f"general.{key}", text, Kind.STRING)
    yield KeyValue("general.tags", ["text-generation", "griffin"], Kind.STRING)


def tokenizer_values(vocabulary: Vocabulary | None, template: str | None) -> Iterator[KeyValue]:
    """Yields the pairs from which llama.cpp makes its tokenizer; `template` is for a chat."""
    if vocabulary is None:
        yield KeyValue("tokenizer.ggml.model", "no_vocab", Kind.STRING)
        return
    yield KeyValue("tokenizer.ggml.model", "llama", Kind.STRING)
    yield KeyValue("tokenizer.ggml.pre", "default", Kind.STRING)
    yield KeyValue("tokenizer.ggml.tokens", vocabulary.tokens, Kind.STRING)
    yield KeyValue("tokenizer.ggml.scores", vocabulary.scores.tolist(), Kind.FLOAT32)
    yield KeyValue("tokenizer.ggml.token_type", vocabulary.types.tolist(), Kind.INT32)
    control = vocabulary.control
    tokens = {
        "bos": control.bos,
        "eos": control.eos or control.end_of_turn,  # llama.cpp assumes 2 where there is none
        "unknown": control.unk,
        "padding": control.pad,
        "eot": control.end_of_turn,
    }
    for name, token in tokens.items():
        if token is not None:
            yield KeyValue(f"tokenizer.ggml.{name}_token_id", token.id, Kind.UINT32)
    flags = {
        "add_bos_token": control.bos is not None,
        "add_eos_token": False,
        "add_space_prefix": vocabulary.add_space_prefix,
    }
    for name, flag in flags.items():
        yield KeyValue(f"tokenizer.ggml.{name}", flag, Kind.BOOL)
    if template:
        yield KeyValue("tokenizer.chat_template", template, Kind.STRING)


def _manifest(checkpoint: Checkpoint, hashes: FileHashes) -> EmbeddedManifest:
    tools = {name: version(name) for name in ("gguf", "numpy")}
    return EmbeddedManifest(
        name=checkpoint.name,
        created_with={"rgexport": __version__, "python": platform.python_version()} | tools,
        source=Source(checkpoint.layout, checkpoint.name, hashes),
        config=checkpoint.config,
        instruction_tuned=checkpoint.instruction_tuned,
        asked_for=checkpoint.asked_for,
    )
