"""The registry of formats: which there are, and where each floor keeps what it knows of them.

A format is one object on each floor, `FORMAT` of the module that is named here: `export` knows
what it stores and how it opens, `runtimes` what runs it, `chat` where its tokenizer lies,
`validate` what its engine may differ by. All other code asks these objects.
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
"""Kind of an artifact → floor → module, or the object itself."""


def format_on(floor: str, kind: str) -> Any:
    """What a floor knows of a kind of artifact; its module is loaded when it is asked for."""
    place = FORMATS[kind][floor]
    return import_module(place).FORMAT if isinstance(place, str) else place
