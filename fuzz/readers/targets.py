"""The table: what is read, and in which module it stands by what that is judged."""

import importlib

from fuzz.readers.target import Target

TARGETS: dict[str, str] = {
    "safetensors": "weights",
    "checkpoint": "weights",
    "pt": "torch_pickles",
    "config": "settings",
    "plan": "settings",
    "tokenizer_model": "tokenizers",
    "tokenizer_json": "tokenizers",
    "vocabulary": "tokenizers",
    "template": "templates",
    "gguf": "ggml",
    "gguf_artifact": "ggml",
    "imatrix": "ggml",
    "onnx": "graphs",
    "manifest": "artifacts",
    "package": "packages",
    "reference": "references",
    "state": "states",
}
"""Target → module; a process loads only what its own target needs."""


def load_target(name: str) -> Target:
    """The target of that name, or one that stands elsewhere: `MODULE:NAME`."""
    path, _, word = name.rpartition(":")
    module = importlib.import_module(path or f"fuzz.readers.{TARGETS[name]}")
    targets: dict[str, Target] = module.TARGETS
    return targets[word]
