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
from tests.deepmind import deepmind_logits, deepmind_model

TEXT = Path(__file__).with_name("unseen.txt")
TOKENS = 600
"""More than two of the demo's windows."""
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}

Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in int4. `--exact`: int8 activations depend a little on how a text is cut."""
    target = tmp_path_factory.mktemp("independent") / "demo"
    assert run(["onnx", "--size", "demo", "--int4", "--exact", "-o", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def report(artifact: Path) -> dict[str, Any]:
    """What `validate --json` says of it on a text that nobody has seen."""
    file = artifact.parent / "report.json"
    asked = "validate", artifact, "--text", TEXT, "--tokens", TOKENS, "--json", file
    assert run(list(map(str, asked))) == 0
    return dict(json.loads(file.read_text()))


@pytest.fixture(scope="module")
def tokens(report: dict[str, Any]) -> np.ndarray:
    """The ids [T] by the engine that made the vocabulary, after a bos."""
    engine = SentencePieceProcessor(model_file=str(demo_folder() / "tokenizer.model"))
    text = TEXT.read_bytes()[: report["text"]["bytes"]].decode()
    return np.array([engine.bos_id(), *engine.encode(text)])


@pytest.fixture(scope="module")
def logits(artifact: Path, tokens: np.ndarray) -> Pair:
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
def log_probabilities(logits: Pair) -> Pair:
    """The same, normalized; what is capped at 30 needs no care in its exponentials."""
    ours, theirs = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in logits)
    return ours, theirs


def test_kl(report: dict[str, Any], log_probabilities: Pair) -> None:
    ours, theirs = log_probabilities
    kl = np.sort((np.exp(ours) * (ours - theirs)).sum(1))
    expected = {
        "mean": kl.sum() / len(kl),
        "standard_error": ((kl - kl.mean()) ** 2).sum() ** 0.5 / (len(kl) * (len(kl) - 1)) ** 0.5,
        **{name: _quantile(kl, share) for name, share in QUANTILES.items()},
    }
    found = {name: report["original"]["kl"][name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    assert 1e-3 < expected["mean"] < 0.5, "four bits cost something, and the model still speaks"


def test_a_reference_file_bounds_the_kl(
    artifact: Path, tokens: np.ndarray, log_probabilities: Pair
) -> None:
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


def _quantile(ordered: np.ndarray, share: float) -> float:
    """Between the two values that stand around it, in proportion."""
    below, part = divmod(share * (len(ordered) - 1), 1)
    a, b = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return float(a + part * (b - a))


def test_perplexity_and_bits_per_byte(
    report: dict[str, Any], tokens: np.ndarray, log_probabilities: Pair
) -> None:
    found, size = report["original"]["likelihood"], report["text"]["bytes"]
    assert found["tokens"] == len(tokens) - 1
    for suffix, model in zip(("", "_candidate"), log_probabilities, strict=True):
        surprise = [-model[i, token] for i, token in enumerate(tokens[1:])]
        perplexity = 2 ** (sum(surprise) / np.log(2) / len(surprise))
        assert found[f"perplexity{suffix}"] == pytest.approx(perplexity, rel=1e-4)
        bits = sum(surprise) / np.log(2) / size
        assert found[f"bits_per_byte{suffix}"] == pytest.approx(bits, rel=1e-4)


def test_agreement(report: dict[str, Any], log_probabilities: Pair) -> None:
    ours, theirs = (np.argsort(-model, axis=1) for model in log_probabilities)
    assert report["original"]["agreement"]["top1"] == np.mean(ours[:, 0] == theirs[:, 0])
    shared = [len({*a[:5]} & {*b[:5]}) / 5 for a, b in zip(ours, theirs, strict=True)]
    assert report["original"]["agreement"]["top5"] == pytest.approx(np.mean(shared), rel=1e-4)


def test_the_logits_themselves(report: dict[str, Any], logits: Pair) -> None:
    ours, theirs = logits
    delta = np.abs(ours - theirs)
    spread = ((ours - ours.mean(1, keepdims=True)) ** 2).mean() ** 0.5
    expected = {
        "max": delta.max(),
        "mean": delta.mean(),
        "relative_max": delta.max() / np.abs(ours).max(),
        "relative_rms": (delta**2).mean() ** 0.5 / spread,
    }
    found = {name: report["original"]["logits"][name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
