"""What onnxruntime-genai needs to run an artifact as it is: its configuration and a tokenizer.

The names of recurrent states are not configured: versions before 0.16 refuse that, and all derive
our names from those of the keys. A fixed axis of keys and values makes them a cache that is updated
in place, so a conversation may be longer than the window.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from rgexport.errors import RequestError
from rgexport.export.onnx.artifact import MODEL_FILE
from rgexport.export.onnx.tokenizer_json import tokenizer_json
from rgexport.griffin.chat_template import GEMMA_TEMPLATE, read_chat_template
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.markup import END_OF_TURN
from rgexport.griffin.tokenizer_files import control_token_names, has_tokenizer
from rgexport.kernels.onnx import library
from rgexport.progress import warn

GENAI_CONFIG = "genai_config.json"
_CONTEXT = 1 << 20
"""Most tokens of a conversation; a state of fixed size has no limit of its own."""
_LENGTH = 8192
"""The same where a program sets none."""
_GEMMA = {"bos_token": 2, "eos_token": 1, "pad_token": 0}
"""Ids in Gemma's vocabulary, for a checkpoint without one; `turn` would be the end of a turn."""


def write_genai_files(
    folder: Path, config: GriffinConfig, *, tuned: bool | None, native: bool
) -> None:
    """Writes `genai_config.json`, and what other programs need of a tokenizer and is not there.

    Args:
        folder: an artifact in the making, with the checkpoint's tokenizer.
        config: of the model.
        tuned: whether the model was tuned for chats.
        native: whether onnxruntime-genai should run our kernels, whose library is copied.

    Raises:
        RequestError: there are no kernels on this machine.
    """
    ids = _GEMMA
    try:
        if has_tokenizer(folder):
            ids = _token_ids(folder)
            _complete_tokenizer(folder, chats=bool(tuned) and "turn" in ids)
    except RequestError as error:
        warn(f"only rgexport will take text with this artifact, other programs token ids: {error}")
    made = _genai_config(config, ids)
    if native:
        made["model"]["decoder"]["session_options"]["custom_ops_library"] = _copy_kernels(folder)
    (folder / GENAI_CONFIG).write_text(json.dumps(made, indent=1) + "\n", "utf-8")


def require_kernels() -> Path:
    """The library of kernels that this machine has.

    Raises:
        RequestError: there is none.
    """
    found = library.library()
    if found is None:
        raise RequestError(
            f"--genai-native copies the native kernels, but {library.kernels().reason}; "
            "or leave it out, and onnxruntime-genai runs its own"
        )
    return found


def _complete_tokenizer(folder: Path, *, chats: bool) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` where the checkpoint has none."""
    converted, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not converted.is_file():
        converted.write_text(tokenizer_json(folder / "tokenizer.model"), "utf-8")
    if not config.is_file():
        made = {"tokenizer_class": "GemmaTokenizer", **control_token_names(folder)}
        if chats and read_chat_template(folder) is None:
            made["chat_template"] = GEMMA_TEMPLATE
        config.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


def _copy_kernels(folder: Path) -> str:
    kernels = require_kernels()
    shutil.copyfile(kernels, folder / kernels.name)
    return kernels.name


def _genai_config(config: GriffinConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    ends = [ids[name] for name in ("eos_token", "turn") if name in ids] or [_GEMMA["eos_token"]]
    decoder = {
        "filename": MODEL_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": config.num_layers,
        "session_options": {"provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "bos_token_id": ids.get("bos_token", ends[0]),
        "eos_token_id": ends,
        "pad_token_id": ids.get("pad_token", ends[0]),
        "context_length": _CONTEXT,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    # Version 0.14 demands the last one.
    search = {"do_sample": False, "max_length": _LENGTH, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def _token_ids(folder: Path) -> dict[str, int]:
    """The ids of those control tokens that the vocabulary has, and of a turn's end.

    Raises:
        RequestError: the tokenizer cannot be read.
    """
    names = {**control_token_names(folder), "turn": END_OF_TURN}
    try:
        if (folder / "tokenizer.model").is_file():
            return _ids_by_sentencepiece(folder / "tokenizer.model", names)
        engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        found = {key: engine.token_to_id(piece) for key, piece in names.items()}
        return {key: i for key, i in found.items() if i is not None}
    except Exception as error:  # of both engines
        raise RequestError(f"the tokenizer cannot be read ({error})") from None


def _ids_by_sentencepiece(path: Path, names: Mapping[str, str]) -> dict[str, int]:
    """As `_token_ids`; an unknown piece has the id of another one."""
    engine = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = {key: engine.PieceToId(piece) for key, piece in names.items()}
    return {key: i for key, i in found.items() if engine.IdToPiece(i) == names[key]}
