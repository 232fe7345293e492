"""llama-perplexity and our own measure of the same text in the same pieces."""

import re
from pathlib import Path

import numpy as np

from rgexport.chat.gguf_text import Vocabulary
from rgexport.cli import run
from rgexport.export.opening import open_artifact
from rgexport.runtimes.llama_cpp.library import load_model
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from rgexport.validate import metrics
from rgexport.validate.text import built_in_text
from tests.llama_tools import needs_llama_cpp, run_tool

PIECE = 256


@needs_llama_cpp
def test_perplexity_is_the_same(llama_tools: Path, tmp_path: Path) -> None:
    """It reads pieces, each behind a <bos> instead of its first token, and judges their halves."""
    path, text = tmp_path / "demo.gguf", tmp_path / "text.txt"
    assert run(["gguf", "--size", "demo", "--type", "f32", "-o", str(path)]) == 0
    text.write_text(built_in_text(), "utf-8")
    arguments = ("-m", path, "-f", text, "-c", str(PIECE), "-t", "1", "-fa", "off")
    told = run_tool(llama_tools / "llama-perplexity", *arguments, ending="Final estimate")
    match = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", told)
    assert match, told

    vocabulary = Vocabulary(load_model(path, vocab_only=True))
    session = LlamaCppSession(open_artifact(path), threads=1)
    ids = [vocabulary.bos_id, *vocabulary.encode(built_in_text())]
    rows = []
    for start in range(0, len(ids) - PIECE + 1, PIECE):
        piece = np.array([vocabulary.bos_id, *ids[start + 1 : start + PIECE]])
        session.reset()
        logits = session.prefill(piece[None, :-1], PIECE // 2 - 1)[0]
        rows.append(metrics.compare_logits(logits, logits, piece[PIECE // 2 + 1 :]))
    found = metrics.likelihood(np.concatenate(rows), None)
    assert found is not None
    assert abs(found.perplexity / float(match[1]) - 1) <= 2e-3
    assert abs(found.perplexity - float(match[1])) <= float(match[2])
