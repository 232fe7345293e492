"""The values of every engine's observer at the sites, against the step model's."""

from unittest.mock import Mock

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.griffin.layout import HEAD_SITES, sites
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import POSITION
from rgexport.runtimes.engine import open_observer, open_session
from rgexport.runtimes.llama_cpp import engine as llama_cpp_engine
from tests.artifacts import require_ggml
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS
from tests.runtimes.test_sessions import EXPORTS, engine
from tests.sessions import distance, random_tokens

FP32 = 1e-4  # largest difference of a value in float32, as a share of the largest at its site
WHOLE = {"prefill_length": 16, "all_logits": True}
SHAPES = "not_by_32", "hawk", "attention_tail", "attention_only"
CASES = [
    *(engine(kind, name, {}) for kind in ("onnx", "gguf") for name in SHAPES),
    engine("onnx", "not_by_32", {"precision": "int4", "exact": True}),
    engine("coreml", "not_by_32", WHOLE),
    engine("coreml", "attention_only", {"prefill_length": 16}),  # the head of the last token
    engine("coreml", "hawk", WHOLE | {"recurrent_state": "hilo"}),
]


def expected_values(artifact, tokens, state):
    """Returns site → value [T, n] of the dequantized reference for tokens [T] after a state."""
    reference = NumpyReference(artifact.manifest.config, artifact.weights)
    values = {}

    def keep(site, op, arguments, results):
        values[site.removesuffix(".weight")] = results[0][0].copy()

    reference.look = keep
    hidden, _ = reference.run(tokens[None], state)
    reference.logits(hidden)
    last = values[f"layers.{reference.config.num_layers - 1}.channel_residual"]
    return values | {"last_tokens": last}


def shown(kind, config):
    """Returns the sites that an engine shows: it fails if llama.cpp renames a tensor."""
    fused = {"onnx": (), "coreml": ("last_tokens",), "gguf": (".gelu", "last_tokens")}[kind]
    return {site for site in sites(config) if not site.endswith(fused)}


def begun(session, config):
    """Returns a state after more than a window, and tokens [64] that follow."""
    tokens = random_tokens(config, 1, 2 * config.window + 5 + 64)
    session.prefill(tokens[:, :-64])
    return session.get_state(), tokens[0, -64:]


@pytest.mark.parametrize(("kind", "name", "options"), CASES)
def test_every_site_equals_the_step_model(kind, name, options, tmp_path):
    artifact, _ = EXPORTS[kind](ODD_CONFIGS[name], tmp_path, **options)
    session, observer = open_session(artifact, threads=1), open_observer(artifact, threads=1)
    state, tokens = begun(session, ODD_CONFIGS[name])
    assert observer.lengths == {"onnx": (32, 1), "coreml": (16, 1), "gguf": (32, 1)}[kind]
    for length in observer.lengths:
        observed = observer.observe(tokens[:length], state)
        expected = expected_values(artifact, tokens[:length], state)
        gates = {site: 1 / (1 + np.exp(-expected[site])) for site in observed.gates}
        values = observed.values | observed.gates
        assert shown(kind, ODD_CONFIGS[name]) <= values.keys() <= expected.keys()
        assert not observed.dtypes and not observed.values.keys() & observed.gates.keys()
        assert bool(gates) == (kind == "gguf" and name != "attention_only")
        assert all(site.endswith("_gate") for site in gates)
        for site, value in values.items():
            right = (expected | gates)[site]
            right = right[-1:] if site in HEAD_SITES and len(value) == 1 else right
            assert value.dtype == np.float32 and value.shape == right.shape, site
            assert distance(value, right) <= FP32, site
        session.set_state(state)
        session.prefill(tokens[None, :length])
        after = session.get_state()
        assert observed.state.keys() == after.keys() and observed.state[POSITION] == after[POSITION]
        for key, array in after.items():
            assert observed.state[key].dtype == array.dtype
            np.testing.assert_allclose(observed.state[key], array, 1e-4, 1e-5, err_msg=key)


FLOAT32 = "_norm", "residual", "rg_lru", "_gate", "logits"
FIRST_LINEAR, ATTENTION = "layers.0.temporal_block.linear_x", "layers.2.temporal_block.attention"
HALF = {FIRST_LINEAR, ATTENTION, "layers.2.temporal_block.rope_q", "layers.2.mlp_block.up_proj"}


@pytest.mark.parametrize(
    ("kind", "precision", "in_half"),
    [
        engine("onnx", "fp16", {FIRST_LINEAR}),
        engine("onnx", "int4", set()),
        *(engine("coreml", precision, HALF | {"lm_head"}) for precision in ("fp16", "pal4")),
        *(engine("gguf", type, {ATTENTION}) for type in ("f16", "q4_0")),
    ],
)
def test_it_computes_what_a_session_computes(kind, precision, in_half, tmp_path):
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
        observed = observer.observe(tokens[:length], state)
        assert observed.values.keys() | observed.gates.keys() >= shown(kind, config)
        for site, value in observed.values.items():
            assert value.dtype == np.float32 and value.shape[0] == length, site
        assert in_half <= observed.dtypes.keys() and set(observed.dtypes.values()) <= {"float16"}
        assert not any(site.endswith(FLOAT32) for site in observed.dtypes)
        assert bool(observed.dtypes) == bool(in_half)
        assert kind == "coreml" or "embed_tokens" not in observed.dtypes
        assert kind != "gguf" or observed.dtypes.keys() == in_half
        session.set_state(state)
        logits = session.prefill(tokens[None, :length], length)
        assert distance(observed.values["logits"], logits[0]) <= limit
        for name, array in session.get_state().items():
            assert distance(observed.state[name], array) <= limit


@needs_llama_cpp
@pytest.mark.parametrize("error", [RequestError("a tensor has gaps"), KeyboardInterrupt()])
def test_what_goes_wrong_inside_llama_cpp_is_raised_outside(error, tmp_path, monkeypatch):
    artifact, _ = EXPORTS["gguf"](ODD_CONFIGS["hawk"], tmp_path)
    observer = open_observer(artifact, threads=1)
    state, tokens = begun(open_session(artifact, threads=1), ODD_CONFIGS["hawk"])
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(llama_cpp_engine, "read_floats", Mock(side_effect=error))
        observer.observe(tokens[:1], state)
    assert observer.observe(tokens[:1], state).values.keys() > {"embed_tokens", "logits"}
