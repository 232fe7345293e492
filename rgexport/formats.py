"""The registry of formats.

A format is one object in each layer, `FORMAT` of the module named below: `export` knows how it is
stored and opened, `runtimes` its engine, `chat` its tokenizer, `validate` its tolerances.
"""

from importlib import import_module
from typing import Any

FORMATS: dict[str, dict[str, Any]] = {
    "onnx": {
        "export": "rgexport.export.onnx.format",
        "runtimes": "rgexport.runtimes.onnx.engine",
        "chat": "rgexport.chat.artifact_text",
        "validate": "rgexport.validate.formats.onnx",
    },
    "coreml": {
        "export": "rgexport.export.coreml.format",
        "runtimes": "rgexport.runtimes.coreml.engine",
        "chat": "rgexport.chat.artifact_text",
        "validate": "rgexport.validate.formats.coreml",
    },
    "gguf": {
        "export": "rgexport.export.gguf.format",
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
