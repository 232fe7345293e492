"""Export RecurrentGemma (Griffin) checkpoints to files that small devices run.

artifact = rgexport.export_model("demo", precision="int4")
print(rgexport.load(artifact.path).chat([{"role": "user", "content": "Hello"}]).text)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgexport._version import __version__
    from rgexport.api import evaluate_models, export_model, quantize_model, validate_artifact
    from rgexport.chat.model import load
    from rgexport.errors import RequestError
    from rgexport.griffin.checkpoint import open_checkpoint

__all__ = [
    "RequestError",
    "__version__",
    "evaluate_models",
    "export_model",
    "load",
    "open_checkpoint",
    "quantize_model",
    "validate_artifact",
]

_MODULES = {
    "__version__": "rgexport._version",
    "evaluate_models": "rgexport.api",
    "export_model": "rgexport.api",
    "quantize_model": "rgexport.api",
    "validate_artifact": "rgexport.api",
    "load": "rgexport.chat.model",
    "RequestError": "rgexport.errors",
    "open_checkpoint": "rgexport.griffin.checkpoint",
}
"""Name → the module that defines it.

A module is imported when its name is first used, so that the command line starts fast.
"""

# Set before the libraries that read them are imported: ONNX Runtime's wheels from 1.29 on would
# keep a device id and a database of events to send in the user's home.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_MODULES[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
