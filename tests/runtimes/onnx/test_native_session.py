"""Sessions with and without native kernels run the kernels that they report."""

import os
from pathlib import Path

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.export.artifact import Artifact
from rgexport.export.onnx.native import NativeOps, native_ops
from rgexport.export.opening import open_artifact
from rgexport.griffin.reference import Reference
from rgexport.kernels.onnx.library import NO_NATIVE, calls
from rgexport.runtimes.onnx import session as runtime
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS
from tests.sessions import distance, ragged

TOKENS = np.arange(2, 60)[None]


@pytest.fixture
def artifact(demo_artifact: Path) -> Artifact:
    return open_artifact(demo_artifact)


@pytest.fixture
def native(artifact: Artifact) -> Artifact:
    """An artifact that has native kernels here."""
    if native_ops(artifact.file("model.onnx")).library is None:
        pytest.skip("no native kernels here: not built, or turned off")
    return artifact


def counted(session: OrtSession) -> int:
    """Calls of native kernels while a session takes tokens."""
    before = sum(calls().values())
    session.prefill(TOKENS)
    session.step(np.array([3]))
    return sum(calls().values()) - before


def test_native_kernels_run_unless_turned_off(native):
    """Beside each other in the same process, too."""
    session, stock = OrtSession(native), OrtSession(native, native=False)
    assert session.info.kernels.startswith("native ") and counted(session) > 0
    assert f", {session.info.kernels} kernels" in session.info.title
    assert stock.info.kernels == "stock" and counted(stock) == 0


def test_as_near_to_the_dequantized_reference_as_stock_kernels_are(native):
    """On trained weights: both round activations to int8, each in its own way."""
    tokens = np.random.default_rng(0).integers(2, native.manifest.config.vocab_size, (1, 90))
    dequantized = Reference(native.manifest.config, native.weights)
    expected = np.asarray(dequantized.logits(dequantized.run(tokens)[0]))
    errors = {}
    for own in (True, False):
        session = OrtSession(native, native=own)
        errors[own] = np.sqrt(np.mean((ragged(session, tokens, [60, 1]) - expected) ** 2))
    assert errors[True] <= 1.5 * errors[False]


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_step_gives_each_row_what_it_gives_it_alone(native, rows):
    """To the last bit, at different positions, also past the window."""
    session, config = OrtSession(native), native.manifest.config
    tokens = np.random.default_rng(rows).integers(2, config.vocab_size, (rows, config.window + 60))
    before, alone, after = [], [], []
    for row in range(rows):
        session.reset(1)
        session.prefill(tokens[row : row + 1, : (config.window + 50) // (row + 1)])
        before.append(session.get_state())
        alone.append([session.step(tokens[row : row + 1, -i])[0] for i in range(1, 6)])
        after.append(session.get_state())
    session.reset(rows)
    session.set_state({k: np.concatenate([state[k] for state in before]) for k in before[0]})
    together = [session.step(tokens[:, -i]) for i in range(1, 6)]
    assert np.array_equal(np.stack(together, 1), np.array(alone))
    for name, array in session.get_state().items():
        assert np.array_equal(array, np.concatenate([state[name] for state in after])), name


EXACT = [n for n, c in ODD_CONFIGS.items() if c.rope_dims % 8 == 0 or n == "hawk"]
"""ONNX Runtime takes cosines and sines four at a time, and what is left over otherwise."""


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_trial_is_single_steps(name, precision, tmp_path):
    """To the last bit: logits, and states after any number of tokens, in rows of a batch too."""
    config = ODD_CONFIGS[name]
    artifact, _ = export_random(config, tmp_path, precision, block_size=16)
    session = OrtSession(artifact)
    exact = session.info.exact_tokens
    if session.info.kernels == "stock":
        pytest.skip("no native kernels here: not built, or turned off")
    assert 4 <= exact <= 16
    rng = np.random.default_rng(0)
    for rows, count in ((1, exact), (2, exact // 2), (1, 3)):
        session.reset(rows)
        session.prefill(rng.integers(0, config.vocab_size, (rows, int(rng.integers(1, 60)))))
        tokens, before = rng.integers(0, config.vocab_size, (rows, count)), session.get_state()
        expected = [session.step(tokens[:, i]) for i in range(count)]
        for kept in range(count + 1):
            session.set_state(before)
            found = session.verify(range(rows), tokens)
            assert np.array_equal(found, np.stack(expected, 1)), f"{rows} x {count}"
            session.accept([kept, *[count - kept] * (rows - 1)])
            after = session.get_state()
            for row, stays in enumerate([kept, *[count - kept] * (rows - 1)]):
                session.set_state({name: array[row : row + 1] for name, array in before.items()})
                for token in tokens[row, :stays]:
                    session.step(token[None])
                for state, array in session.get_state().items():
                    assert np.array_equal(after[state][row], array[0]), (state, kept)
            session.reset(rows)


@pytest.mark.parametrize(("name", "precision"), [("regular", "fp32"), ("irregular", "int4")])
def test_where_the_engine_computes_other_bits_there_are_no_exact_trials(tmp_path, name, precision):
    """Its products depend on the number of tokens, and its sines where heads are small."""
    config = ODD_CONFIGS[name]
    session = OrtSession(export_random(config, tmp_path, precision)[0])
    assert session.info.exact_tokens == 1
    tokens = np.array([[3, 4, 5]])
    expected = session.prefill(tokens, 3)
    for count in (1, 3):  # they work all the same
        session.reset(1)
        assert distance(session.verify(range(1), tokens[:, :count]), expected[:, :count]) < 1e-2
        session.accept([1])
        assert session.position == 1


def test_library_of_another_machine(artifact, tmp_path, monkeypatch, capsys):
    """It warns and goes on."""
    file = tmp_path / "library.so"
    file.write_bytes(b"\x7fELF of another machine")
    there = NativeOps({"RgLruScan": 1}, ("RgLruScan",), file, "native avx2", "")
    monkeypatch.setattr(runtime, "native_ops", lambda model: there)
    session = OrtSession(artifact)
    assert session.info.kernels == "stock"
    (line,) = capsys.readouterr().err.splitlines()
    assert "will be slower" in line and "library.so" in line
    assert np.isfinite(session.step(np.array([3]))).all()


COMMANDS = {
    "generate": ["--ids", "2,3,4", "-n", "2"],
    "bench": ["-p", "4", "-n", "2", "-r", "1", "-o", "json"],
    "validate": ["--tokens", "40", "--bench"],
}


@pytest.mark.parametrize(
    ("command", "variable"), [("generate", "0"), ("bench", None), ("validate", None)]
)
def test_option_turns_them_off_and_gives_the_variable_back(
    command, variable, demo_artifact, monkeypatch, capsys
):
    monkeypatch.setattr("rgexport.runtimes.bench.measure.WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr("rgexport.validate.speed.SECONDS", 0.0)
    monkeypatch.delenv(NO_NATIVE, raising=False)
    if variable:
        monkeypatch.setenv(NO_NATIVE, variable)
    asked, before = [command, str(demo_artifact), *COMMANDS[command], "--no-native"], calls()
    assert run(asked) == 0 and calls() == before and os.environ.get(NO_NATIVE) == variable
    assert command == "generate" or "stock" in capsys.readouterr().out
    assert run([*asked, "--no-such-option"]) == 2 and os.environ.get(NO_NATIVE) == variable


def test_export_checks_what_users_run(native, capsys, tmp_path):
    target = tmp_path / "checked"
    before = sum(calls().values())
    assert run(["onnx", "--size", "demo", "--int8", "-o", str(target)]) == 0
    kernels = native_ops(target / "model.onnx").kernels
    assert f", {kernels} kernels" in capsys.readouterr().out
    assert sum(calls().values()) > before
