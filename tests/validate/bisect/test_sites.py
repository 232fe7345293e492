"""Sites of a model that the reference itself computes, sound or with a fault."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from rgexport.export.manifest import IoRecord, Manifest, Source
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.griffin.sites import sites
from rgexport.griffin.state import State, state_specs
from rgexport.griffin.substitution import substituted
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine, Float, Scheme
from rgexport.runtimes.observation import Observation
from rgexport.validate.bisect.site_errors import SiteError, site_errors
from rgexport.validate.bisect.sites import site_report, with_large_state
from tests.models import make_config, random_weights, weight_source
from tests.validate.toys import counted

CONFIG = make_config("rar", width=48, heads=4, lru_width=64, vocab_size=90, window=12)
WEIGHTS = weight_source(random_weights(CONFIG))
TEXT = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 50)
BEFORE, TOKENS = TEXT[:40], TEXT[40:]
GATE = "layers.2.temporal_block.rg_lru.recurrent_gate"
FLOAT32 = Float("float32")
Faults = Mapping[str, Callable[[np.ndarray], np.ndarray]]
"""Site → what becomes of its value [1, T, n], for all that follow too."""


def manifest_of(config: GriffinConfig, scheme: Scheme = FLOAT32, compute: str = "fp32") -> Manifest:
    """The manifest of an artifact without files."""
    return Manifest(
        name="toy",
        created_with={},
        source=Source("toy", "toy", {}),
        config=config,
        precision="toy",
        compute=compute,
        exact=False,
        plan=make_plan(config, scheme, scheme),
        tensors={},
        states=(),
        io=IoRecord((), ()),
        instruction_tuned=None,
        files={},
    )


def state_after(config: GriffinConfig, weights: WeightSource, tokens: np.ndarray) -> State:
    """The canonical state after tokens [T]."""
    return Reference(config, weights).run(tokens[None])[1]


def observe(
    config: GriffinConfig,
    weights: WeightSource,
    tokens: np.ndarray,
    state: State,
    faults: Faults | None = None,
) -> Observation:
    """What an artifact with faults at some sites would show over tokens [T]."""
    values: dict[str, np.ndarray] = {}

    def look(site, op, argument, results):
        value = (faults or {}).get(site, lambda value: value)(results[0])
        values[site] = value[0].copy()
        return value

    model = Reference(config, weights)
    with substituted(look):
        hidden, after = model.run(tokens[None], state)
        model.logits(hidden)
    return Observation(values=values, gates={}, dtypes={}, state=after)


def compare(found, state=None, scheme=FLOAT32, compute="fp32") -> list[SiteError]:
    manifest = manifest_of(CONFIG, scheme, compute)
    state = state_after(CONFIG, WEIGHTS, BEFORE) if state is None else state
    tokens = TOKENS[-len(found.values["embed_tokens"]) :]
    model = Reference(CONFIG, WEIGHTS)
    return site_errors(model, manifest, CONFIG.window, state, [(tokens, found)])


def observed(config=CONFIG, faults=None):
    """As an artifact of `config` takes the last tokens, and the state that it starts from."""
    state = state_after(config, WEIGHTS, BEFORE)
    return observe(config, WEIGHTS, TOKENS, state, faults), state


def beyond(errors) -> list[str]:
    return [error.state or error.site for error in errors if not error.passed]


def test_the_reference_agrees_with_itself_at_every_site_and_state():
    errors = compare(*observed())
    assert [e.site for e in errors if e.state is None] == [
        site for site in sites(CONFIG) if site != "last_tokens"
    ]
    assert {e.state for e in errors} - {None} == {spec.name for spec in state_specs(CONFIG)}
    states = [(e.site, e.layer) for e in errors if e.state == "layers.1.value"]
    assert states == [("layers.1.temporal_block.attention", 1)]
    assert all(e.rms == e.median == e.excess == 0 and e.length == len(TOKENS) for e in errors)
    assert site_report(errors).first is None


def test_another_epsilon_shows_in_the_norms_alone():
    errors = compare(*observed(dataclasses.replace(CONFIG, rms_eps=1e-3)))
    assert {e.op for e in errors if not e.passed} == {"rms_norm"}


@pytest.mark.parametrize(
    ("scheme", "compute"),
    [(FLOAT32, "fp32"), (Affine(4, 32, symmetric=False), "fp32"), (Float("float16"), "fp16")],
)
def test_a_gate_in_half_is_seen_beside_other_rounding(scheme, compute):
    found, state = observed(faults={GATE: lambda x: x.astype(np.float16).astype(np.float32)})
    assert beyond(compare(found, state, scheme, compute)) == [GATE]


def test_a_value_that_is_not_finite_is_reported_at_its_site():
    found, state = observed()
    found.values["layers.0.mlp_block.mul"][3, 5] = np.nan
    (error,) = (e for e in compare(found, state) if not e.passed)
    assert error.site == "layers.0.mlp_block.mul"
    assert error.excess == np.inf


@pytest.mark.parametrize("gain", [1.0, 1.001])
def test_a_gate_after_its_sigmoid(gain):
    found, state = observed()
    found.gates[GATE] = gain / (1 + np.exp(-found.values.pop(GATE).astype(np.float64)))
    errors = compare(found, state)
    assert GATE in [e.site for e in errors]
    assert beyond(errors) == ([] if gain == 1 else [GATE])


def test_the_head_may_have_the_last_token_alone():
    found, state = observed()
    for site in ("final_norm", "lm_head", "logits"):
        found.values[site] = found.values[site][-1:]
    assert beyond(compare(found, state)) == []
    found.values["logits"] = found.values["logits"] * np.float32(1.001)
    assert beyond(compare(found, state)) == ["logits"]


def test_one_key_of_many_shows_where_the_oldest_are_amplified():
    config = make_config("ra", width=48, heads=4, lru_width=64, vocab_size=90, window=512)
    weights = random_weights(config)
    weights["layers.1.temporal_block.k_proj.weight"] *= 1e-3  # all keys count alike
    source = weight_source(weights)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, 700)
    quiet = state_after(config, source, tokens)
    narrow = dataclasses.replace(config, window=511)
    found = []
    for state in (quiet, with_large_state(quiet)):
        taken = {
            name: array[:, 1:] if array.ndim == 3 and array.shape[1] == 512 else array
            for name, array in state.items()
        }
        calls = [(tokens[:1], observe(narrow, source, tokens[:1], taken))]
        errors = site_errors(Reference(config, source), manifest_of(config), 512, state, calls)
        found.append(next(e.rms for e in errors if e.op == "local_attention"))
    assert found[0] < 0.01
    assert found[1] > 0.15


def test_calls_of_several_lengths_read_every_weight_once():
    state = state_after(CONFIG, WEIGHTS, BEFORE)
    calls = [(TOKENS[-n:], observe(CONFIG, WEIGHTS, TOKENS[-n:], state)) for n in (6, 1)]
    calls[1][1].values[GATE] *= 2
    reads: list[str] = []
    model = Reference(CONFIG, counted(WEIGHTS, reads))
    errors = site_errors(model, manifest_of(CONFIG), CONFIG.window, state, calls)
    first, *rest = (e for e in errors if not e.passed)
    assert first.site == GATE
    assert {e.length for e in (first, *rest)} == {1}
    assert [e.site for e in errors if e.length == 6] == [e.site for e in errors if e.length == 1]
    assert {reads.count(name) for name in WEIGHTS if name != EMBEDDING} == {1}


def test_a_site_that_is_not_shown_is_judged_with_the_next_one():
    found, state = observed(faults={"layers.0.mlp_block.gelu": lambda value: value * 1.01})
    del found.values["layers.0.mlp_block.gelu"]
    assert beyond(compare(found, state)) == ["layers.0.mlp_block.mul"]


def test_the_report_has_the_first_and_the_worst():
    faults = {GATE: lambda x: 1.01 * x, "layers.0.mlp_block.mul": lambda x: 2 * x}
    found, state = observed(faults=faults)
    report = site_report(compare(found, state), ["last_tokens"])
    assert report.first.site == "layers.0.mlp_block.mul"
    assert [e.site for e in report.beyond] == ["layers.0.mlp_block.mul", GATE]
    assert [e.site for e in report.worst(2)] == ["layers.0.mlp_block.mul", GATE]
    assert report.worst(1)[0].rms == pytest.approx(1, rel=1e-5)
