"""llama.cpp's own programs (`make llama-tools` builds them), and its quantizer as a library."""

import ctypes
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "out" / "llama" / "bin"


@pytest.fixture(scope="session")
def llama_tools() -> Path:
    """The folder with `llama-quantize`, `llama-perplexity`, `llama-bench`, `llama-server`, …"""
    if not FOLDER.is_dir():
        pytest.skip("llama.cpp's tools are not built: make llama-tools")
    return FOLDER


def run_tool(
    tool: Path, *arguments: str | Path, timeout: float = 300, ending: str = "", tries: int = 8
) -> str:
    """Runs one of them and gives what it printed; a failure shows all of it.

    Their log is written by a thread of its own, which on a busy machine may be gone before the
    last lines are: where `ending` is missing in them, it is run again.
    """
    command = [str(tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{tool.name}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    told = done.stdout + done.stderr
    if ending in told or tries <= 1:
        return told
    return run_tool(tool, *arguments, timeout=timeout, ending=ending, tries=tries - 1)


def llama_quantize(source: Path, target: Path, kind: str, *, pure: bool) -> None:
    """Quantizes a file as the program of that name does, in the installed library."""
    import llama_cpp
    from gguf import LlamaFileType

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure = LlamaFileType[f"MOSTLY_{kind.upper()}"], pure
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(options)) == 0


def installed_version() -> str:
    """The version of the installed llama-cpp-python; empty where there is none."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return ""


needs_llama_cpp = pytest.mark.skipif(
    "+rgexport." not in installed_version(),
    reason="there is no llama.cpp with RecurrentGemma: make llama",
)
