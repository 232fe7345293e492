"""`genai_config.json`, by which onnxruntime-genai runs an artifact as it is.

The names of recurrent states are left out: versions before 0.16 refuse them, and every version
derives them from the names of the keys. A fixed axis of keys and values makes them a cache that is
updated in place, so a conversation may be longer than the window.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.export.onnx.artifact import MODEL_FILE
from rgexport.export.tokenizer import ControlIds
from rgexport.griffin.config import GriffinConfig
from rgexport.kernels.onnx import library

GENAI_CONFIG = "genai_config.json"
_CONTEXT = 1 << 20
"""Most tokens of a conversation; a state of fixed size has no limit of its own."""
_LENGTH = 8192
"""The same where a program sets none."""


def write_genai_config(
    folder: Path, config: GriffinConfig, ids: ControlIds, files: Iterable[str]
) -> None:
    """Writes the configuration; if our kernels are among the artifact's `files`, it names them."""
    made = _genai_config(config, ids)
    if kernels := kernels_among(files):
        made["model"]["decoder"]["session_options"]["custom_ops_library"] = kernels
    (folder / GENAI_CONFIG).write_text(json.dumps(made, indent=1) + "\n", "utf-8")


def kernels_among(files: Iterable[str]) -> str | None:
    """Returns the file of native kernels, made for any system; None where there is none."""
    return next((name for name in sorted(files) if Path(name).stem == library.LIBRARY.stem), None)


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


def _genai_config(config: GriffinConfig, ids: ControlIds) -> dict[str, Any]:
    decoder = {
        "filename": MODEL_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": config.num_layers,
        # 0 is ONNX Runtime's own choice; genai's is half of it on machines with two processors.
        "session_options": {"provider_options": [], "intra_op_num_threads": 0},
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
        **ids.fields(),
        "context_length": _CONTEXT,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    # Version 0.14 demands the last one.
    search = {"do_sample": False, "max_length": _LENGTH, "past_present_share_buffer": True}
    return {"model": model, "search": search}
