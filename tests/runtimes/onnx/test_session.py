"""ONNX Runtime sessions of all precisions against their dequantized references."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.native import native_ops
from rgexport.export.onnx.profiles import PROFILES
from rgexport.griffin.reference import Reference
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine, FloatDtype
from rgexport.runtimes.onnx import session as runtime
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, make_config, weight_source
from tests.sessions import distance, ragged, random_tokens

EXACT = 5e-5
"""Largest |Δlogit| allowed, as a share of the largest |logit|."""


QUANTIZED = ODD_CONFIGS | {
    "288": make_config("rar", width=288, heads=4, lru_width=96, mlp_width=40),
    "300": make_config("rar", width=300, heads=5, lru_width=40, mlp_width=288),
}
"""Also rows that are padded, and rows whose blocks are smaller than was asked."""


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["narrow_lru", "not_by_32", "not_by_128", "288", "300"])
def test_exact_artifact_equals_its_dequantized_reference(
    name: str, precision: str, symmetric: bool, block: int, tmp_path: Path
) -> None:
    config = QUANTIZED[name]
    artifact, _ = export_random(
        config, tmp_path, precision, symmetric=symmetric, block_size=block, exact=True
    )
    check_exact(artifact)


def check_exact(artifact: Artifact) -> None:
    """Compares a run of an artifact without rounded activations with its dequantized reference."""
    config = artifact.manifest.config
    tokens = random_tokens(config, 2, 2 * config.window + 5)
    dequantized = Reference(config, artifact.weights)
    hidden, state = dequantized.run(tokens)
    session = OrtSession(artifact)
    session.reset(2)
    assert distance(ragged(session, tokens, [9, 1]), dequantized.logits(hidden)) <= EXACT
    for name, array in session.get_state().items():
        np.testing.assert_allclose(array, state[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", ["float32", "float16"])
@pytest.mark.parametrize("profile", PROFILES)
def test_scales_of_both_dtypes(profile: str, scale: FloatDtype, tmp_path: Path) -> None:
    """Those of artifacts of an earlier release, and of plans for any profile."""
    config = QUANTIZED["288"]
    linear = Affine(4, 64, symmetric=False, scale=scale)
    plan = make_plan(config, linear, Affine(8, 32, symmetric=True, scale=scale))
    artifact, _ = export_random(config, tmp_path, None, plan=plan, profile=profile, exact=True)
    parts = artifact.manifest.tensors["layers.0.mlp_block.up_proj.weight"].parts
    assert parts["scales"].dtype == scale
    check_exact(artifact)


@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["288", "300"])
def test_rounded_activations_are_near_the_dequantized_reference(
    name: str, precision: str, block: int, native: bool, tmp_path: Path
) -> None:
    config = QUANTIZED[name]
    artifact, _ = export_random(config, tmp_path, precision, block_size=block)
    tokens = random_tokens(config, 2, 40)
    dequantized = Reference(config, artifact.weights)
    session = OrtSession(artifact, native=native)
    session.reset(2)
    expected = dequantized.logits(dequantized.run(tokens)[0])
    assert distance(ragged(session, tokens, [9, 1]), expected) <= 5e-2


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_states_in_place_equal_states_apart(precision: str, native: bool, tmp_path: Path) -> None:
    """Bit for bit: the same file by plain `run`, each state in and out in buffers of its own."""
    config = ODD_CONFIGS["irregular"]
    artifact, _ = export_random(config, tmp_path, precision)
    tokens = random_tokens(config, 2, 2 * config.window + 6)
    session = OrtSession(artifact, native=native)
    session.reset(2)
    options, path = onnxruntime.SessionOptions(), artifact.path / runtime.MODEL_FILE
    if native:
        library = native_ops(path).library or pytest.skip("the native kernels are not built")
        options.register_custom_ops_library(str(library))
    plain = onnxruntime.InferenceSession(str(path), options)
    records = artifact.manifest.states
    states = {r.input: np.zeros((2, *r.shape), r.dtype) for r in records}
    for start, stop in itertools.pairwise([0, 1, 2, 9, 40, *range(41, tokens.shape[1] + 1)]):
        positions = np.tile(np.arange(start, stop), (2, 1))
        feeds = {"input_ids": tokens[:, start:stop], "position_ids": positions} | states
        logits, *after = plain.run(None, feeds)
        states = dict(zip(states, after, strict=True))
        np.testing.assert_array_equal(session.prefill(tokens[:, start:stop]), logits)


def test_decays_next_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a = 0.99999 the oracle's own arithmetic is what limits the agreement.

    torch's float32 `exp` is not correctly rounded for 4 % of the numbers next to 0, and there one
    unit in its last place is 0.3 % of 1 - a². Rounded correctly, the reference moves away from
    DeepMind's code by as much as ONNX Runtime does, and both agree with each other.
    """
    config = ODD_CONFIGS["hawk"]
    artifact, weights = export_random(config, tmp_path, slowest=1e-5)
    tokens = random_tokens(config, 2, 4 * config.window)
    session = OrtSession(artifact)
    session.reset(2)
    found = session.prefill(tokens, tokens.shape[1])
    assert distance(found, deepmind_logits(deepmind_model(config, weights), tokens)) <= 3e-4

    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: exp(x.double()).float())
    reference = Reference(config, weight_source(weights))
    assert distance(found, reference.logits(reference.run(tokens)[0])) <= 1e-5


def test_num_logits_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ODD_CONFIGS["regular"]
    session = OrtSession(export_random(config, tmp_path)[0])
    tokens = random_tokens(config, 1, 40)
    every = session.prefill(tokens, 40)
    monkeypatch.setattr(runtime, "PREFILL_CHUNK", 16)
    for wanted in (1, 7, 8, 9, 24, 25, 40, 99):
        session.reset()
        found = session.prefill(tokens, wanted)
        assert found.shape[1] == min(wanted, 40)
        assert distance(found, every[:, -wanted:]) <= 1e-5


LATER_CHUNKS = """
import sys
import numpy as np
from pathlib import Path
from rgexport.export.opening import open_artifact
from rgexport.runtimes.onnx.session import PREFILL_CHUNK, OrtSession
from rgexport.runtimes.memory import rss_bytes
session = OrtSession(open_artifact(Path(sys.argv[1])))
for chunks in (1, 1, 3):
    session.prefill(np.ones((1, chunks * PREFILL_CHUNK), np.int64))
    print(rss_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds")
def test_later_chunks_of_a_prompt_take_no_more_memory(demo_artifact: Path) -> None:
    command = [sys.executable, "-c", LATER_CHUNKS, str(demo_artifact)]
    first, *later = map(int, subprocess.check_output(command).split())
    assert max(later) - first < 4 << 20
