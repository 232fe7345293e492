"""The same files in stock onnxruntime-web, without our kernels and without conversion.

In Node with WASM, and in headless Chromium with WASM and with WebGPU, in software.
"""

import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.onnx.storage import FileLimit
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS
from tests.web.browser import chromium, run_page
from tests.web.npm import node_with_packages

WEB = Path(__file__).parents[2] / "web"
SHARE = 1e-3
"""Largest |Δlogit| allowed, as a share of the largest |logit|."""
ON_A_PROCESSOR = set("Cast Concat Cos Neg Reshape Shape Sin Slice Squeeze Unsqueeze".split())
"""The ops of a WebGPU graph that ONNX Runtime runs on the CPU, as they handle shapes and int64."""

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def node() -> str:
    """Node, with onnxruntime-web installed."""
    return node_with_packages()


@pytest.fixture(scope="module")
def browser(node: str) -> None:
    if not chromium():
        pytest.skip("Chromium is not installed, such as Debian's chromium-headless-shell")


def _native(artifact: Artifact, chunks: list[list[int]]) -> np.ndarray:
    """The logits after each chunk, by ONNX Runtime on this machine's processor."""
    session = OrtSession(artifact)
    return np.concatenate([session.prefill(np.array([chunk]))[0] for chunk in chunks])


def _check(found: list[list[float]], artifact: Artifact, chunks: list[list[int]]) -> None:
    expected = _native(artifact, chunks)
    assert np.abs(np.array(found) - expected).max() <= SHARE * np.abs(expected).max()


def _chunks(vocabulary: int, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, vocabulary, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("profile", "precision", "exact"),
    [
        ("wasm", "fp32", False),
        ("wasm", "fp16", False),
        ("wasm", "int8", False),
        ("wasm", "int4", False),
        ("cpu", "int8", True),  # at accuracy level 4, WASM does not round as others do
        ("cpu", "int4", True),
        ("cpu", "fp32", False),
    ],
)
def test_runs_in_node(node: str, profile: str, precision: str, exact: bool, tmp_path: Path) -> None:
    config = ODD_CONFIGS["narrow_lru"]
    artifact, _ = export_random(config, tmp_path, precision, profile=profile, exact=exact)
    chunks = _chunks(config.vocab_size, 1, 1, config.window + 2, config.window + 5)
    asked = [node, "run.mjs", str(artifact.path), json.dumps(chunks)]
    done = subprocess.run(asked, cwd=WEB, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _check(json.loads(done.stdout.splitlines()[-1]), artifact, chunks)


@pytest.mark.parametrize(
    ("profile", "precision"),
    [
        ("wasm", "int8"),
        ("webgpu", "int4"),
        ("webgpu", "int8"),
        ("webgpu", "fp32"),
    ],
)
def test_odd_shapes_in_chromium(
    browser: None, profile: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are no whole blocks, a ring that wraps around, and weights in many files."""
    config = ODD_CONFIGS["not_by_32"]
    files = FileLimit(filled=1 << 14, largest=1 << 20)
    monkeypatch.setitem(PROFILES, profile, replace(PROFILES[profile], files=files))
    artifact, _ = export_random(config, tmp_path, precision, profile=profile)
    assert sum(name.startswith("model.onnx.data") for name in artifact.manifest.files) > 2
    chunks = _chunks(config.vocab_size, 1, 1, config.window + 2, 3)
    found = run_page(artifact.path, {"provider": profile, "chunks": chunks})
    assert "error" not in found, found["error"]
    _check(found["logits"], artifact, chunks)


def test_a_graphics_card_computes_all_but_shapes(browser: None, tmp_path: Path) -> None:
    """By ONNX Runtime's log of where it places each node."""
    artifact, _ = export_random(ODD_CONFIGS["not_by_32"], tmp_path, "int4", profile="webgpu")
    found = run_page(artifact.path, {"provider": "webgpu", "chunks": [], "verbose": True})
    assert "error" not in found, found["error"]
    placed: dict[str, Counter[str]] = {}
    ops = Counter[str]()
    for line in found["logs"]:
        if provider := re.search(r"placed on \[(\w+)\]", line):
            ops = placed.setdefault(provider[1], Counter())
        elif node := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", line):
            ops[node[1]] += 1
    assert placed["WebGpuExecutionProvider"]["LinearAttention"] == 2
    assert placed["CPUExecutionProvider"].keys() <= ON_A_PROCESSOR
    assert placed["WebGpuExecutionProvider"].total() > 9 * placed["CPUExecutionProvider"].total()
