"""llama-perplexity's KL mode and our own measure of the same text in the same pieces."""

import re
from pathlib import Path

import numpy as np
import pytest

from rgexport.chat.gguf_text import Vocabulary
from rgexport.cli import run
from rgexport.export.opening import open_artifact
from rgexport.runtimes.llama_cpp.library import load_model
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from rgexport.validate import metrics
from tests.llama_tools import needs_llama_cpp, run_tool

TEXT = Path(__file__).with_name("unseen.txt")
PIECE = 128
WANTED = PIECE // 2 - 1
"""Positions of a piece that are compared: its second half, except the last one."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The demo with all of its bits, and with four."""
    folder = tmp_path_factory.mktemp("kl")
    made = {kind: folder / f"{kind}.gguf" for kind in ("f32", "q4_0")}
    for kind, path in made.items():
        assert run(["gguf", "--size", "demo", "--type", kind, "-o", str(path)]) == 0
    return made


@pytest.fixture(scope="module")
def printed(llama_tools, files) -> str:
    """What llama-perplexity prints about the second file against the logits of the first."""
    tool, logits = llama_tools / "llama-perplexity", files["f32"].with_suffix(".kld")
    common = "-c", str(PIECE), "-t", "1", "-fa", "off", "--kl-divergence-base", logits
    run_tool(tool, "-m", files["f32"], "-f", TEXT, *common)
    return run_tool(tool, "-m", files["q4_0"], *common, "--kl-divergence", ending="Same top p")


@pytest.fixture(scope="module")
def ours(files) -> np.ndarray:
    """Our rows; llama-perplexity reads pieces, each with a <bos> instead of its first token."""
    vocabulary = Vocabulary(load_model(files["f32"], vocab_only=True))
    sessions = [
        LlamaCppSession(open_artifact(path), threads=1, flash_attention=False)
        for path in files.values()
    ]
    ids = [vocabulary.bos_id, *vocabulary.encode(TEXT.read_text("utf-8"))]
    rows = []
    for start in range(0, len(ids) - PIECE + 1, PIECE):
        piece = np.array([vocabulary.bos_id, *ids[start + 1 : start + PIECE]])
        for session in sessions:
            session.reset()
        reference, candidate = (s.prefill(piece[None, :-1], WANTED)[0] for s in sessions)
        rows.append(metrics.compare_logits(reference, candidate, piece[-WANTED:]))
    return np.concatenate(rows)


def _number(printed: str, name: str) -> tuple[float, float]:
    """A figure and its error bar, 0 where there is none."""
    match = re.search(rf"^{name} *: +([\d.]+)(?:%? ± +([\d.]+))?", printed, re.MULTILINE)
    assert match, printed
    return float(match[1]), float(match[2] or 0)


@needs_llama_cpp
def test_its_figures_are_ours(printed, ours):
    """It stores logits in 16 bits, of which a part in a hundred of a KL may be lost."""
    (mean, error), kl = _number(printed, "Mean    KLD"), metrics.kl_summary(ours)
    assert abs(kl.mean - mean) <= min(error, 0.01 * mean)
    assert kl.standard_error == pytest.approx(error, rel=0.02)
    assert 0.005 < mean < 0.1
    names = {"Median": 0.5, "95.0% ": 0.95, "99.0% ": 0.99, "Maximum": 1.0}
    for name, quantile in names.items():
        theirs, _ = _number(printed, f"{name} +KLD")
        assert np.quantile(ours["kl"], quantile) == pytest.approx(theirs, rel=0.02)
    percent, error = _number(printed, "Same top p")
    # A tie in 16 bits may be broken otherwise at one position.
    assert abs(100 * metrics.agreement(ours).top1 - percent) <= min(error, 100 / len(ours) + 1e-3)
    # Only of the second file: of the first, its 16 bits cut off what is very unlikely.
    perplexity, error = _number(printed, r"Mean PPL\(Q\)")
    found = metrics.likelihood(ours, None).perplexity_candidate
    assert found == pytest.approx(perplexity, rel=2e-3) and abs(found - perplexity) <= error
