"""The values of every engine's observer at the sites, against the step model's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rgexport.export.artifact import Artifact
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.reference import Reference
from rgexport.griffin.sites import HEAD_SITES, sites
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.engine import open_observer, open_session
from rgexport.runtimes.observation import Observation
from rgexport.runtimes.session import Session
from tests.artifacts import require_ggml
from tests.models import ODD_CONFIGS
from tests.runtimes.engines import EXPORTS, engine
from tests.sessions import distance, random_tokens

FP32 = 1e-4
"""Largest difference of a value in float32, as a share of the largest at its site."""
WHOLE = {"prefill_length": 16, "all_logits": True}
LENGTHS = {"onnx": (32, 1), "coreml": (16, 1), "gguf": (32, 1)}
SHAPES = "wide_lru", "not_by_32", "hawk", "attention_tail", "attention_only"
CASES = [
    *(engine(kind, name, {}) for kind in ("onnx", "gguf") for name in SHAPES),
    engine("onnx", "not_by_32", {"precision": "int4", "exact": True}),
    *(engine("coreml", name, WHOLE) for name in SHAPES),
    engine("coreml", "hawk", WHOLE | {"recurrent_state": "hilo"}),
]


class _Sites(TorchDispatchMode):
    """Keeps the first result of every op of the op set."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, np.ndarray] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.namespace == "griffin":
            first: torch.Tensor = result[0] if isinstance(result, tuple) else result
            self.values[args[-1].removesuffix(".weight")] = first[0].float().numpy().copy()
        return result


def expected_values(artifact: Artifact, tokens: np.ndarray, state: State) -> dict[str, np.ndarray]:
    """Returns site → value [T, n] of the dequantized reference for tokens [T] after a state."""
    reference = Reference(artifact.manifest.config, artifact.weights)
    dispatched = _Sites()
    with torch.inference_mode(), dispatched:
        hidden, _ = reference.run(tokens[None], state)
        reference.logits(hidden)
    last = dispatched.values[f"layers.{reference.config.num_layers - 1}.channel_residual"]
    return dispatched.values | {"last_tokens": last}


def shown(kind: str, config: GriffinConfig) -> set[str]:
    """Returns the sites that an engine shows: it fails if llama.cpp renames a tensor."""
    fused = {"onnx": (), "coreml": ("last_tokens",), "gguf": (".gelu", "last_tokens")}[kind]
    return {site for site in sites(config) if not site.endswith(fused)}


def begun(session: Session, config: GriffinConfig) -> tuple[State, np.ndarray]:
    """Returns a state after more than a window, and tokens [64] that follow."""
    tokens = random_tokens(config, 1, 2 * config.window + 5 + 64)
    session.prefill(tokens[:, :-64])
    return session.get_state(), tokens[0, -64:]


def check_observer(kind: str, artifact: Artifact) -> list[Observation]:
    """Compares the values of calls of every length with the dequantized reference's."""
    session, observer = open_session(artifact, threads=1), open_observer(artifact, threads=1)
    state, tokens = begun(session, artifact.manifest.config)
    observations = []
    for length in observer.lengths:
        found = observer.observe(tokens[:length], state)
        expected = expected_values(artifact, tokens[:length], state)
        present = found.values.keys() | found.gates.keys()
        assert shown(kind, artifact.manifest.config) <= present <= expected.keys()
        assert not found.values.keys() & found.gates.keys()
        for site, value in found.values.items():
            require_value(site, value, expected[site])
        for site, gate in found.gates.items():
            require_value(site, gate, 1 / (1 + np.exp(-expected[site])))
        session.set_state(state)
        session.prefill(tokens[None, :length])
        require_same_state(found.state, session.get_state())
        observations.append(found)
    return observations


def require_value(site: str, value: np.ndarray, expected: np.ndarray) -> None:
    if site in HEAD_SITES and len(value) == 1:
        expected = expected[-1:]
    assert value.dtype == np.float32 and value.shape == expected.shape, site
    assert distance(value, expected) <= FP32, site


def require_same_state(state: State, expected: State) -> None:
    assert state.keys() == expected.keys() and state[POSITION] == expected[POSITION]
    for name, array in expected.items():
        assert state[name].shape == array.shape and state[name].dtype == array.dtype
        np.testing.assert_allclose(state[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("kind", "name", "options"), CASES)
def test_every_site_equals_the_step_model(
    kind: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    artifact, _ = EXPORTS[kind](ODD_CONFIGS[name], tmp_path, **options)
    assert open_observer(artifact, threads=1).lengths == LENGTHS[kind]
    for found in check_observer(kind, artifact):
        assert not found.dtypes
        assert bool(found.gates) == (kind == "gguf" and name != "attention_only")
        assert all(site.endswith("_gate") for site in found.gates)


def test_a_prefill_without_all_logits_shows_the_head_of_its_last_token(tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    artifact, _ = EXPORTS["coreml"](config, tmp_path, prefill_length=8)
    whole, single = check_observer("coreml", artifact)
    assert whole.values.keys() == set(sites(config)) and len(whole.values["embed_tokens"]) == 8
    assert all(len(whole.values[site]) == 1 for site in HEAD_SITES)
    assert "last_tokens" not in single.values


FLOAT32 = {"layers.0.temporal_residual", "layers.0.temporal_block.rg_lru", "final_norm", "logits"}
FIRST_LINEAR, ATTENTION = "layers.0.temporal_block.linear_x", "layers.2.temporal_block.attention"


@pytest.mark.parametrize(
    ("kind", "precision", "in_half"),
    [
        engine("onnx", "fp16", {FIRST_LINEAR}),
        engine("onnx", "int4", set()),
        *(engine("coreml", p, {FIRST_LINEAR, "lm_head"}) for p in ("fp16", "int4", "pal4")),
        *(engine("gguf", type, {ATTENTION}) for type in ("f16", "q8_0", "q4_0")),
    ],
)
def test_it_computes_what_a_session_computes(
    kind: str, precision: str, in_half: set[str], tmp_path: Path
) -> None:
    """To the last bit, in float16 where the engine does, such as flash attention and a cache.

    An ONNX session fuses ops that an observer cannot: without roundings to float16 between them, or
    with other last bits of float32, which may round an activation to another int8 number.
    """
    if kind == "gguf":
        require_ggml()
    config = ODD_CONFIGS["regular"]
    options = {"prefill_length": 8, "all_logits": True} if kind == "coreml" else {}
    artifact, _ = EXPORTS[kind](config, tmp_path, precision, **options)
    session, observer = open_session(artifact, threads=1), open_observer(artifact, threads=1)
    state, tokens = begun(session, config)
    limit = 1e-2 if kind == "onnx" else 0.0
    for length in observer.lengths:
        found = observer.observe(tokens[:length], state)
        assert found.values.keys() | found.gates.keys() >= shown(kind, config)
        for site, value in found.values.items():
            assert value.dtype == np.float32 and value.shape[0] == length, site
        assert in_half <= found.dtypes.keys() and set(found.dtypes.values()) <= {"float16"}
        assert not found.dtypes.keys() & FLOAT32 and bool(found.dtypes) == bool(in_half)
        assert kind == "coreml" or "embed_tokens" not in found.dtypes
        assert kind != "gguf" or found.dtypes.keys() == in_half
        session.set_state(state)
        logits = session.prefill(tokens[None, :length], length)
        assert distance(found.values["logits"], logits[0]) <= limit
        for name, array in session.get_state().items():
            assert distance(found.state[name], array) <= limit
