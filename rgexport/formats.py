"""The registry of formats.

A format is one object in each layer, named `FORMAT` in the module below:

- `artifacts`: how it is stored and opened
- `export`: how it is written; importing this module takes torch and the format's converter
- `runtimes`: its engine
- `chat`: its tokenizer
- `validate`: its tolerances
"""

from importlib import import_module
from typing import Any

FORMATS: dict[str, dict[str, Any]] = {
    "onnx": {
        "artifacts": "rgexport.artifacts.onnx.format",
        "export": "rgexport.export.onnx.exporter",
        "runtimes": "rgexport.runtimes.onnx.engine",
        "chat": "rgexport.chat.artifact_text",
        "validate": "rgexport.validate.formats.onnx",
    },
    "coreml": {
        "artifacts": "rgexport.artifacts.coreml.format",
        "export": "rgexport.export.coreml.exporter",
        "runtimes": "rgexport.runtimes.coreml.engine",
        "chat": "rgexport.chat.artifact_text",
        "validate": "rgexport.validate.formats.coreml",
    },
    "gguf": {
        "artifacts": "rgexport.artifacts.gguf.format",
        "export": "rgexport.export.gguf.exporter",
        "runtimes": "rgexport.runtimes.llama_cpp.engine",
        "chat": "rgexport.chat.gguf_text",
        "validate": "rgexport.validate.formats.gguf",
    },
}
"""Kind of an artifact → layer → module, or the object itself."""


def format_on(layer: str, kind: str) -> Any:
    """Returns the object of a kind of artifact in a layer; imports its module when first needed."""
    entry = FORMATS[kind][layer]
    return import_module(entry).FORMAT if isinstance(entry, str) else entry
