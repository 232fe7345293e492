"""The port: which llama.cpp it is made for, and what it changes there."""

import hashlib
from functools import cache
from pathlib import Path

from rgexport.kernels.llama_cpp.unified_diff import Hunk, parse

DISTRIBUTION = "llama-cpp-python"
RELEASE = "0.3.36"
"""The release of the Python bindings whose llama.cpp the port is made for."""
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of its source archive."""
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
"""The commit of llama.cpp in it."""

MODEL_FILE = "src/models/recurrentgemma.cpp"
"""The model file's place in a llama.cpp tree, whose build compiles all of `src/models`."""
BUILD_COMMAND = "rgexport llama-cpp build"

_HERE = Path(__file__).parent
_MODEL, _REGISTRATION = _HERE / "recurrentgemma.cpp", _HERE / "registration.patch"


def model_source() -> str:
    """The text of the model file."""
    return _MODEL.read_text("utf-8")


@cache
def registration() -> dict[str, tuple[Hunk, ...]]:
    """What is changed in files that llama.cpp has already: path in its tree → hunks."""
    return parse(_REGISTRATION.read_text("utf-8"))


@cache
def port_version() -> str:
    """The version of a patched build, such as `0.3.36+rgexport.g1a2b3c4d`.

    A local version: `==0.3.36` accepts it, pip does not replace it, and it changes with the port.
    """
    digest = hashlib.sha256(_MODEL.read_bytes() + _REGISTRATION.read_bytes()).hexdigest()
    return f"{RELEASE}+rgexport.g{digest[:8]}"
