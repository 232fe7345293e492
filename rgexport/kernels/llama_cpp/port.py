"""The port: which llama.cpp it is made for, what it changes there, and which one is installed."""

import hashlib
import mmap
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rgexport.kernels.llama_cpp.unified_diff import Hunk, parse

DISTRIBUTION = "llama-cpp-python"
RELEASE = "0.3.36"
"""The release of the Python bindings whose llama.cpp the port is made for."""
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of its source archive."""
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
"""The llama.cpp inside of it."""

ARCHITECTURE = "recurrentgemma"
MODEL_FILE = "src/models/recurrentgemma.cpp"
"""Where the model file goes in a llama.cpp tree, whose build takes in all of `src/models`."""
BUILD_COMMAND = "rgexport llama-cpp build"

_HERE = Path(__file__).parent
_MODEL, _REGISTRATION = _HERE / "recurrentgemma.cpp", _HERE / "registration.patch"


def model_source() -> str:
    """The model file."""
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


@dataclass(frozen=True)
class Installed:
    """The llama.cpp of this environment.

    Attributes:
        version: of the Python package.
        runs_recurrentgemma: whether its library knows the architecture, by our port or otherwise.
    """

    version: str
    runs_recurrentgemma: bool

    @property
    def is_current(self) -> bool:
        """Whether it was built from the port as it is in this package."""
        return self.version == port_version()

    def __str__(self) -> str:
        patch = "with" if self.runs_recurrentgemma else "without"
        return f"{DISTRIBUTION} {self.version} ({patch} RecurrentGemma)"


def installed() -> Installed | None:
    """Looks at the `llama-cpp-python` of this environment, without loading it."""
    try:
        found = version(DISTRIBUTION)
    except PackageNotFoundError:
        return None
    return Installed(found, any(map(_knows_architecture, _libraries())))


def _libraries() -> list[Path]:
    spec = find_spec("llama_cpp")
    folders = [Path(place) / "lib" for place in (spec and spec.submodule_search_locations) or ()]
    return [path for folder in folders for path in folder.glob("*llama.*") if path.is_file()]


def _knows_architecture(library: Path) -> bool:
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        return image.find(b"\0" + ARCHITECTURE.encode() + b"\0") >= 0
