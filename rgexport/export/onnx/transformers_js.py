"""What transformers.js needs to run an artifact: `config.json`, and the class that it lacks."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from rgexport import npm
from rgexport._version import __version__
from rgexport.export.identity import identity_of
from rgexport.export.manifest import Manifest
from rgexport.export.onnx.artifact import weight_files
from rgexport.export.tokenizer import ControlIds
from rgexport.files.typed_json import to_json
from rgexport.griffin.chat_template import chat_template

CONFIG = "config.json"
MODULES = "recurrent_gemma.mjs", "state_file.mjs"


def write_web_files(folder: Path, manifest: Manifest, ids: ControlIds) -> None:
    """Writes `config.json` and copies the modules; `rgexport` in it is what the modules read."""
    template, _ = chat_template(folder)
    config = manifest.config
    made = {
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
    (folder / CONFIG).write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    for name in MODULES:
        shutil.copyfile(Path(npm.__file__).with_name(name), folder / name)
