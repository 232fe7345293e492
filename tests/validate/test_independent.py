"""The figures of a report against those of other code: DeepMind's model and a few lines here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from rgexport.artifacts.opening import open_artifact
from rgexport.chat.gguf_text import LlamaCppVocabulary
from rgexport.cli import run
from rgexport.griffin.checkpoint import demo_folder, open_checkpoint
from rgexport.runtimes.llama_cpp.library import load_model
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate import metrics
from tests.artifacts import export_demo
from tests.deepmind import deepmind_logits, deepmind_model
from tests.llama_tools import needs_llama_cpp, run_tool

TEXT = Path(__file__).with_name("unseen.txt")
TOKENS = 300  # more than one of the demo's windows
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """The demo in int4. `--exact`: int8 activations depend a little on how a text is cut."""
    target = tmp_path_factory.mktemp("independent") / "demo"
    export_demo(target, "onnx", "--int4", "--exact")
    return target


@pytest.fixture(scope="module")
def report(artifact):
    """What `validate --json` says of it on a text that nobody has seen."""
    file = artifact.parent / "report.json"
    asked = "--json", str(file), "--text", str(TEXT), "--tokens", str(TOKENS)
    assert run(["validate", str(artifact), *asked]) == 0
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def read(artifact, report):
    """Its ids [T], and logits of DeepMind's model and of the artifact: float64 [T, vocab].

    The ids are from the engine that made the vocabulary.
    """
    engine = SentencePieceProcessor(model_file=str(demo_folder() / "tokenizer.model"))
    text = TEXT.read_bytes()[: report["text"]["bytes"]].decode()
    tokens = np.array([engine.bos_id(), *engine.encode(text)])
    file = load_file(demo_folder() / "model.safetensors")
    weights = {name.removeprefix("model."): x.float().numpy() for name, x in file.items()}
    model = deepmind_model(open_checkpoint(size="demo").config, weights)
    theirs = OrtSession(open_artifact(artifact)).prefill(tokens[None], len(tokens))[0]
    ours = deepmind_logits(model, tokens[None])[0]
    return tokens, (ours.astype(np.float64), theirs.astype(np.float64))


def assert_figures(found: dict[str, float], expected: dict[str, float]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_figures_of_a_report(report, read):
    found, (tokens, logits) = report["original"], read
    # Logits are capped at 30, so that their exponentials need no care.
    log_probabilities = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in logits]
    ours, theirs = log_probabilities
    kl = (np.exp(ours) * (ours - theirs)).sum(1)
    assert 1e-3 < kl.mean() < 0.5, "four bits cost something, and the model still speaks"
    error = ((kl - kl.mean()) ** 2).sum() ** 0.5 / (len(kl) * (len(kl) - 1)) ** 0.5
    expected = {name: np.quantile(kl, share) for name, share in QUANTILES.items()}
    expected |= {"mean": kl.mean(), "standard_error": error, "worst_position": kl.argmax()}
    assert_figures(found["kl"], expected)

    surprise = [-model[np.arange(len(tokens) - 1), tokens[1:]] for model in log_probabilities]
    bits = [nats.sum() / np.log(2) for nats in surprise]
    perplexity = [2 ** (total / (len(tokens) - 1)) for total in bits]
    size = report["text"]["bytes"]
    expected = {
        "tokens": len(tokens) - 1,
        "perplexity": perplexity[0],
        "perplexity_candidate": perplexity[1],
        "bits_per_byte": bits[0] / size,
        "bits_per_byte_candidate": bits[1] / size,
    }
    assert_figures(found["likelihood"], expected)

    first, second = (np.argsort(-model, axis=1) for model in log_probabilities)
    assert found["agreement"]["top1"] == np.mean(first[:, 0] == second[:, 0])
    shared = [len({*a[:5]} & {*b[:5]}) / 5 for a, b in zip(first, second, strict=True)]
    assert_figures(found["agreement"], {"top5": np.mean(shared)})

    assert [one["name"] for one in report["continuations"]] == ["prose", "code", "chat turns"]
    assert all(0 <= one["common"] <= one["tokens"] > 0 for one in report["continuations"])
    original, delta = logits[0], np.abs(logits[0] - logits[1])
    lengths = [np.linalg.norm(x, axis=1) for x in logits]
    cosine = (logits[0] * logits[1]).sum(1) / lengths[0] / lengths[1]
    spread = ((original - original.mean(1, keepdims=True)) ** 2).mean() ** 0.5
    expected = {
        "max": delta.max(),
        "mean": delta.mean(),
        "relative_max": delta.max() / np.abs(original).max(),
        "relative_rms": (delta**2).mean() ** 0.5 / spread,
        "cosine": cosine.mean(),
        "lowest_cosine": cosine.min(),
    }
    assert_figures(found["logits"], expected)


# ---- llama-perplexity's KL mode, on the same text in the same pieces ------------------------

PIECE = 128
WANTED = PIECE // 2 - 1
"""Positions of a piece that are compared: its second half, except the last one."""


def rows_of(files: dict[str, Path]) -> np.ndarray:
    """Our rows; llama-perplexity reads pieces, each with a <bos> instead of its first token."""
    vocabulary = LlamaCppVocabulary(load_model(files["f32"], vocab_only=True))
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
def test_its_figures_are_ours(llama_tools, tmp_path):
    """It stores logits in 16 bits, which may change a KL by 1 %."""
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("f32", "q4_0")}
    for kind, path in files.items():
        export_demo(path, "gguf", "--type", kind)
    tool, ours = llama_tools / "llama-perplexity", rows_of(files)
    asked = "-c", str(PIECE), "-t", "1", "-fa", "off", "--kl-divergence-base", tmp_path / "kld"
    run_tool(tool, "-m", files["f32"], "-f", TEXT, *asked)
    printed = run_tool(tool, "-m", files["q4_0"], *asked, "--kl-divergence", ending="Same top p")
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
