"""Writes the files by which onnxruntime-genai and transformers.js run an artifact.

They take keys and values as [batch_size, heads, window, head_dim]; the first one asks for logits of
one token, the second one for the name `batch_size`. `genai_config.json` has no recurrent states, as
versions before 0.16 refuse them. A fixed axis of keys and values makes a cache that is updated in
place.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rgexport import npm
from rgexport._version import __version__
from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.manifest import Manifest, identity_of
from rgexport.artifacts.onnx.model_file import MODEL_FILE, weight_files
from rgexport.files.typed_json import to_json
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.control_tokens import chat_template
from rgexport.kernels.onnx import library

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"


def write_genai_config(
    folder: Path, config: GriffinConfig, ids: ControlIds, files: Iterable[str]
) -> None:
    """Writes `genai_config.json`; it names our kernels if they are among the artifact's `files`."""
    # 0 is ONNX Runtime's own choice; genai's is half of it on machines with two processors.
    options: dict[str, Any] = {"provider_options": [], "intra_op_num_threads": 0}
    for name in sorted(files, reverse=True):
        if Path(name).stem == library.LIBRARY.stem:  # made for any system
            options["custom_ops_library"] = name
    decoder = {
        "filename": MODEL_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": config.num_layers,
        "session_options": options,
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
        "context_length": 1 << 20,  # a state of fixed size has no limit of its own
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    # Version 0.14 demands the last one.
    search = {"do_sample": False, "max_length": 8192, "past_present_share_buffer": True}
    _write_json(folder / GENAI_CONFIG, {"model": model, "search": search})


def write_web_files(folder: Path, manifest: Manifest, ids: ControlIds) -> None:
    template, _ = chat_template(folder)
    config = manifest.config
    fields = {
        "model_type": "recurrent_gemma",
        "architectures": ["RecurrentGemmaForCausalLM"],
        **ids.fields(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "block_types": list(config.block_types),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "attention_window_size": config.window,
        "rgexport": {
            "version": __version__,
            "identity": asdict(identity_of(manifest, template)),
            "states": [to_json(record) for record in manifest.states],
            "data_files": weight_files(manifest),
        },
    }
    _write_json(folder / CONFIG, fields)
    for name in ("recurrent_gemma.mjs", "state_file.mjs"):
        shutil.copyfile(Path(npm.__file__).with_name(name), folder / name)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", "utf-8")
