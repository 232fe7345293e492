"""The registry of formats.

A format is one object in each layer, `FORMAT` of the module named below: `export` knows how it is
stored and opened, `runtimes` its engine, `chat` its tokenizer, `validate` its tolerances.
"""

from importlib import import_module
from typing import Any

_LAYERS = "export", "runtimes", "chat", "validate"
_MODULES = {
    "onnx": ("onnx.format", "onnx.engine", "artifact_text", "formats.onnx"),
    "coreml": ("coreml.format", "coreml.engine", "artifact_text", "formats.coreml"),
    "gguf": ("gguf.format", "llama_cpp.engine", "gguf_text", "formats.gguf"),
}
"""Kind of an artifact → module in each layer's package."""

FORMATS: dict[str, dict[str, Any]] = {
    kind: dict(zip(_LAYERS, modules, strict=True)) for kind, modules in _MODULES.items()
}
"""Kind of an artifact → layer → module in its package, or the object itself."""


def format_on(layer: str, kind: str) -> Any:
    """Returns the object of a kind of artifact in a layer; imports its module when first needed."""
    entry = FORMATS[kind][layer]
    return import_module(f"rgexport.{layer}.{entry}").FORMAT if isinstance(entry, str) else entry
