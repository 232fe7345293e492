"""Export RecurrentGemma (Griffin) checkpoints to files that small devices run."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgexport.chat.model import load

    __version__: str

__all__ = ["__version__", "load"]

# Before anything that reads them is imported: ONNX Runtime's wheels from 1.29 on would keep a
# device id and a database of events to send in the user's home.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def __getattr__(name: str) -> Any:
    """Finds a name when it is used: the command line needs none of this to begin."""
    if name == "__version__":
        from importlib.metadata import version

        return version("rgexport")
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rgexport.chat.model import load

    return load
