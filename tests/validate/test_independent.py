"""The figures of a report against those of other code: DeepMind's model and a few lines here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from rgexport.cli import run
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import demo_folder, open_checkpoint
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_demo
from tests.deepmind import deepmind_logits, deepmind_model

TEXT = Path(__file__).with_name("unseen.txt")
TOKENS = 600
"""More than two of the demo's windows."""
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}

Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """The demo in int4. `--exact`: int8 activations depend a little on how a text is cut."""
    target = tmp_path_factory.mktemp("independent") / "demo"
    export_demo(target, "onnx", "--int4", "--exact")
    return target


@pytest.fixture(scope="module")
def report(artifact) -> dict[str, Any]:
    """What `validate --json` says of it on a text that nobody has seen."""
    file = artifact.parent / "report.json"
    asked = "validate", artifact, "--text", TEXT, "--tokens", TOKENS, "--json", file
    assert run(list(map(str, asked))) == 0
    return dict(json.loads(file.read_text()))


@pytest.fixture(scope="module")
def tokens(report) -> np.ndarray:
    """The ids [T] by the engine that made the vocabulary, after a bos."""
    engine = SentencePieceProcessor(model_file=str(demo_folder() / "tokenizer.model"))
    text = TEXT.read_bytes()[: report["text"]["bytes"]].decode()
    return np.array([engine.bos_id(), *engine.encode(text)])


@pytest.fixture(scope="module")
def logits(artifact, tokens) -> Pair:
    """Of DeepMind's model in float32, and of the artifact in ONNX Runtime: float64 [T, vocab]."""
    weights = {
        name.removeprefix("model."): tensor.float().numpy()
        for name, tensor in load_file(demo_folder() / "model.safetensors").items()
    }
    model = deepmind_model(open_checkpoint(size="demo").config, weights)
    session = OrtSession(open_artifact(artifact))
    theirs = session.prefill(tokens[None], len(tokens))[0]
    return deepmind_logits(model, tokens[None])[0].astype(np.float64), theirs.astype(np.float64)


@pytest.fixture(scope="module")
def log_probabilities(logits) -> Pair:
    """The same, normalized; what is capped at 30 needs no care in its exponentials."""
    ours, theirs = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in logits)
    return ours, theirs


def _quantile(ordered: np.ndarray, share: float) -> float:
    """Between the two values that stand around it, in proportion."""
    below, part = divmod(share * (len(ordered) - 1), 1)
    a, b = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return float(a + part * (b - a))


def test_the_figures_of_a_report(report, tokens, logits, log_probabilities):
    found, (ours, theirs) = report["original"], log_probabilities
    kl = np.sort((np.exp(ours) * (ours - theirs)).sum(1))
    assert 1e-3 < kl.mean() < 0.5, "four bits cost something, and the model still speaks"
    error = ((kl - kl.mean()) ** 2).sum() ** 0.5 / (len(kl) * (len(kl) - 1)) ** 0.5
    quantiles = {name: _quantile(kl, share) for name, share in QUANTILES.items()}
    assert_figures(found["kl"], quantiles | {"mean": kl.mean(), "standard_error": error})

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

    original, delta = logits[0], np.abs(logits[0] - logits[1])
    spread = ((original - original.mean(1, keepdims=True)) ** 2).mean() ** 0.5
    expected = {
        "max": delta.max(),
        "mean": delta.mean(),
        "relative_max": delta.max() / np.abs(original).max(),
        "relative_rms": (delta**2).mean() ** 0.5 / spread,
    }
    assert_figures(found["logits"], expected)


def assert_figures(found: dict[str, float], expected: dict[str, float]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_reference_file_bounds_the_kl(artifact, tokens, log_probabilities):
    """The same text as the one prompt of a file, which leaves out what is unlikely."""
    prompts, file, told = (artifact.parent / name for name in ("p.json", "r", "told.json"))
    prompts.write_text(json.dumps([tokens.tolist()]))
    capture = "reference", "--size", "demo", "--prompts", prompts, "-o", file
    judge = "validate", artifact, "--reference", file, "--tokens", 20, "--json", told
    assert [run(list(map(str, asked))) for asked in (capture, judge)] == [0, 0]
    found = json.loads(told.read_text())["reference"]

    ours, theirs = log_probabilities
    kl = np.sort((np.exp(ours) * (ours - theirs)).sum(1))
    quantiles = {name: _quantile(kl, share) for name, share in QUANTILES.items()}
    for name, expected in {"mean": kl.mean(), **quantiles}.items():
        low, high = found["kl_low"][name], found["kl_high"][name]
        assert low * (1 - 1e-4) <= expected <= high * (1 + 1e-4), name
        assert high - low <= 2e-3 * expected, name
    assert found["positions"] == len(tokens) > found["full_positions"]
    assert found["kl_width"] <= 1e-3
    surprise = -ours[np.arange(len(tokens) - 1), tokens[1:]]
    assert found["likelihood"]["nll"] == pytest.approx(surprise.mean(), rel=1e-4)
