"""The registry of formats.

A format is one object in each layer, `FORMAT` of the module named below: `exporters` knows how it
is stored and opened, `runtimes` its engine, `chat` its tokenizer, `validation` its tolerances.
`export`, which needs torch, has `EXPORTER`: how it is written.
"""

from importlib import import_module
from typing import Any

FORMATS: dict[str, dict[str, Any]] = {
    "onnx": {
        "exporters": "rgexport.exporters.onnx.format",
        "export": "rgexport.exporters.onnx.exporter",
        "runtimes": "rgexport.runtimes.onnx.engine",
        "chat": "rgexport.chat.artifact_text",
        "validation": "rgexport.validation.formats.onnx",
    },
    "coreml": {
        "exporters": "rgexport.exporters.coreml.format",
        "export": "rgexport.exporters.coreml.exporter",
        "runtimes": "rgexport.runtimes.coreml.engine",
        "chat": "rgexport.chat.artifact_text",
        "validation": "rgexport.validation.formats.coreml",
    },
    "gguf": {
        "exporters": "rgexport.exporters.gguf.format",
        "export": "rgexport.exporters.gguf.exporter",
        "runtimes": "rgexport.runtimes.llama_cpp.engine",
        "chat": "rgexport.chat.gguf_text",
        "validation": "rgexport.validation.formats.gguf",
    },
}
"""Kind of an artifact → layer → module, or the object itself."""


def format_on(layer: str, kind: str) -> Any:
    """Returns the object of a kind of artifact in a layer; imports its module when first needed."""
    entry = FORMATS[kind][layer]
    return import_module(entry).FORMAT if isinstance(entry, str) else entry
