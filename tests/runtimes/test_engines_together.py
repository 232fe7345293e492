"""Two engines that take turns in one thread leave each other's processor state alone."""

from pathlib import Path

import numpy as np

from rgexport.cli import run
from rgexport.export.gguf.artifact import open_gguf
from rgexport.export.opening import open_artifact
from rgexport.runtimes.engine import open_session
from tests.llama_tools import needs_llama_cpp


@needs_llama_cpp
def test_llama_cpp_goes_on_after_native_kernels(demo_artifact: Path, tmp_path: Path) -> None:
    """On AMX it configures a thread's tiles once, and an instruction was illegal after ours."""
    target = tmp_path / "demo.gguf"
    assert run(["gguf", "--size", "demo", "--type", "q4_0", "--no-check", "-o", str(target)]) == 0
    llama, onnx = open_session(open_gguf(target)), open_session(open_artifact(demo_artifact))
    tokens = np.arange(2, 66)[None]
    said = {}
    for turn in range(2):
        for session in (llama, onnx):
            session.reset()
            logits = session.prefill(tokens)
            assert np.array_equal(logits, said.setdefault(session, logits)), turn
