"""ONNX Runtime sessions of each profile, with native kernels and without."""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from rgexport.artifacts.onnx.model_file import NativeOps, native_ops
from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.onnx import web_ops
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import POSITION
from rgexport.kernels.onnx.library import NO_NATIVE, calls, library
from rgexport.runtimes.machine import rss_bytes
from rgexport.runtimes.onnx import session as runtime
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random, load_graph
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, make_config
from tests.sessions import distance, ragged, random_tokens

EXACT = 5e-5  # largest |Δlogit| allowed, as a share of the largest |logit|
PADDED = {
    "288": make_config("rar", width=288, heads=4, lru_width=96, mlp_width=40),
    "300": make_config("rar", width=300, heads=5, lru_width=40, mlp_width=288),
}
"""Rows that are padded, and rows whose blocks are smaller than was asked."""


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["not_by_32", *PADDED])
def test_exact_artifact_equals_its_dequantized_reference(
    name: str, precision: str, symmetric: bool, block: int, tmp_path: Path
) -> None:
    config, options = (ODD_CONFIGS | PADDED)[name], {"symmetric": symmetric, "block_size": block}
    artifact, _ = export_random(config, tmp_path, precision, exact=True, **options)
    tokens = random_tokens(config, 2, 2 * config.window + 5)
    dequantized = Reference(config, artifact.weights)
    hidden, state = dequantized.run(tokens)
    session = OrtSession(artifact, threads=1)
    session.reset(2)
    assert distance(ragged(session, tokens, [9, 1]), dequantized.logits(hidden)) <= EXACT
    for name, array in session.get_state().items():
        np.testing.assert_allclose(array, state[name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds")
def test_later_chunks_of_a_prompt_take_no_more_memory(demo_artifact: Path) -> None:
    session, sizes = OrtSession(open_artifact(demo_artifact), threads=1), []
    for chunks in (1, 1, 3):
        session.prefill(np.ones((1, chunks * runtime.PREFILL_CHUNK), np.int64))
        sizes.append(rss_bytes())
    assert max(sizes[1:]) - sizes[0] < 4 << 20


needs_native = pytest.mark.skipif(library() is None, reason="no native kernels here")


@needs_native
def test_native_kernels_run_unless_turned_off(demo_artifact):
    """Beside each other in the same process, too."""
    artifact = open_artifact(demo_artifact)
    session, stock = OrtSession(artifact), OrtSession(artifact, native=False)
    assert session.info.kernels.startswith("native ") and stock.info.kernels == "stock"
    assert f", {session.info.kernels} kernels" in session.info.title
    for one, is_counted in ((session, True), (stock, False)):
        before = calls()
        one.prefill(np.arange(2, 60)[None])
        assert (calls() != before) == is_counted


@pytest.mark.parametrize("name", ["wide_lru", "hawk", "attention_tail", "one_head"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
@needs_native
def test_a_trial_is_single_steps(name, precision, tmp_path):
    """To the last bit: logits, and states after any number of tokens, in rows of a batch too."""
    config = ODD_CONFIGS[name]
    artifact, _ = export_random(config, tmp_path, precision, block_size=16)
    session = OrtSession(artifact, threads=1)
    exact = session.info.exact_tokens
    assert 4 <= exact <= 16
    rng = np.random.default_rng(0)
    for rows, count in ((1, exact), (2, exact // 2), (1, 3)):
        session.reset(rows)
        session.prefill(rng.integers(0, config.vocab_size, (rows, int(rng.integers(1, 60)))))
        tokens, before = rng.integers(0, config.vocab_size, (rows, count)), session.get_state()
        expected = [session.step(tokens[:, i]) for i in range(count)]
        for kept in range(count + 1):
            session.set_state(before)
            logits = session.verify(range(rows), tokens)
            assert np.array_equal(logits, np.stack(expected, 1)), f"{rows} x {count}"
            session.accept([kept, *[count - kept] * (rows - 1)])
            after = session.get_state()
            for row, stays in enumerate([kept, *[count - kept] * (rows - 1)]):
                session.set_state({name: array[row : row + 1] for name, array in before.items()})
                for token in tokens[row, :stays]:
                    session.step(token[None])
                for state, array in session.get_state().items():
                    assert np.array_equal(after[state][row], array[0]), (state, kept)
            session.reset(rows)
    session.verify(range(1), tokens)
    with pytest.raises(ValueError, match="cannot be kept"):
        session.accept([4])
    session.accept([2])
    with pytest.raises(ValueError, match="call verify first"):
        session.accept([2])


@pytest.mark.parametrize(("name", "precision"), [("regular", "fp32"), ("irregular", "int4")])
def test_where_the_engine_computes_other_bits_there_are_no_exact_trials(tmp_path, name, precision):
    """Its products depend on the number of tokens, and its sines where heads are small."""
    session = OrtSession(export_random(ODD_CONFIGS[name], tmp_path, precision)[0])
    assert session.info.exact_tokens == 1


def test_library_of_another_machine(demo_artifact, tmp_path, monkeypatch, capsys):
    file = tmp_path / "library.so"
    file.write_bytes(b"\x7fELF of another machine")
    there = NativeOps({"RgLruScan": 1}, ("RgLruScan",), file, "native avx2", "")
    monkeypatch.setattr(runtime.model_file, "native_ops", lambda model: there)
    session = OrtSession(open_artifact(demo_artifact))
    assert session.info.kernels == "stock"
    (line,) = capsys.readouterr().err.splitlines()
    assert "will be slower" in line and "library.so" in line
    assert np.isfinite(session.step(np.array([3]))).all()


@pytest.mark.parametrize("variable", ["0", None])
def test_option_turns_them_off_and_gives_the_variable_back(variable, demo_artifact, monkeypatch):
    monkeypatch.delenv(NO_NATIVE, raising=False)
    if variable:
        monkeypatch.setenv(NO_NATIVE, variable)
    command, before = ["generate", str(demo_artifact), "--ids", "2,3", "-n", "2"], calls()
    assert run([*command, "--no-native"]) == 0
    assert calls() == before and os.environ.get(NO_NATIVE) == variable
    assert run([*command, "--no-native", "--no-such-option"]) == 2
    assert os.environ.get(NO_NATIVE) == variable


@needs_native
def test_export_checks_what_users_run(capsys, tmp_path):
    target, before = tmp_path / "checked", sum(calls().values())
    assert run(["onnx", "--size", "demo", "--int8", "-o", str(target)]) == 0
    kernels = native_ops(target / "model.onnx").kernels
    assert f", {kernels} kernels" in capsys.readouterr().out
    assert sum(calls().values()) > before


@pytest.mark.parametrize("profile", ["wasm", "webgpu"])
def test_position_zero_forgets_the_state(profile: str, tmp_path: Path) -> None:
    """Any recurrent state: the decay is exactly 0 there, not only small."""
    config = ODD_CONFIGS["hawk"]
    artifact, _ = export_random(config, tmp_path, "int8", profile=profile)
    tokens = random_tokens(config, 1, 9)
    session = OrtSession(artifact)
    expected = session.prefill(tokens, 9)
    state = session.get_state() | {POSITION: np.zeros(1, np.int64)}
    for name, array in state.items():
        if name.endswith(("rg_lru", "conv1d")):
            array[:] = 1e30 if name.endswith("rg_lru") else 0
    session.set_state(state)
    np.testing.assert_array_equal(session.prefill(tokens, 9), expected)


@pytest.mark.parametrize("options", [{"precision": "int4"}, {"precision": "int8", "exact": True}])
def test_large_matrices_are_unpacked_in_pieces(options, tmp_path, monkeypatch):
    """Rows of a product do not depend on each other."""
    config = ODD_CONFIGS["not_by_32"]
    products, logits = [], []
    for size in (web_ops.PIECE, 1000):
        monkeypatch.setattr(web_ops, "PIECE", size)
        artifact, _ = export_random(config, tmp_path / str(size), profile="wasm", **options)
        nodes = load_graph(artifact).graph.node
        products.append(sum(node.op_type == "MatMulNBits" for node in nodes))
        logits.append(OrtSession(artifact).prefill(random_tokens(config, 1, 20), 20))
    assert products[1] > 2 * products[0]
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-5)


def test_an_old_onnx_runtime_is_told_in_one_line(tmp_path, monkeypatch):
    artifact, _ = export_random(ODD_CONFIGS["hawk"], tmp_path, profile="webgpu")
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    with pytest.raises(RequestError, match=r"needs ONNX Runtime 1\.25 or later; this is 1\.24\.4"):
        OrtSession(artifact)


def test_decays_next_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a = 0.99999 the arithmetic of DeepMind's model limits how near a session can come.

    torch's float32 `exp` is off by a unit next to 0, which is 0.3 % of 1 - a². Where it is rounded
    correctly, the reference is as near to ONNX Runtime as elsewhere.
    """
    config = ODD_CONFIGS["hawk"]
    artifact, weights = export_random(config, tmp_path, slowest=1e-5)
    tokens = random_tokens(config, 2, 4 * config.window)
    session = OrtSession(artifact)
    session.reset(2)
    logits = session.prefill(tokens, tokens.shape[1])
    assert distance(logits, deepmind_logits(deepmind_model(config, weights), tokens)) <= 3e-4
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: exp(x.double()).float())
    reference = Reference(config, artifact.weights)
    assert distance(logits, reference.logits(reference.run(tokens)[0])) <= 1e-5
