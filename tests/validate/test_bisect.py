"""Bisection: sites of a model that the reference itself computes, layers' costs, and suspects."""

import dataclasses

import numpy as np
import pytest

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, sites
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import state_specs
from rgexport.quantize.schemes.registry import Affine, Float
from rgexport.runtimes.engine import Observation
from rgexport.validate import metrics
from rgexport.validate.bisect.site_report import site_report, with_large_state
from rgexport.validate.bisect.sites import ObservedCall, SiteError, layer_of, site_errors
from rgexport.validate.bisect.suspects import CONFIG_SITES, find_suspects
from rgexport.validate.checks import Check
from rgexport.validate.costs import LAYER_TOKENS, layer_costs
from tests.models import make_config, random_weights, weight_source
from tests.validate.toys import FLOAT32, counted, manifest_of

CONFIG = make_config("rar", width=48, heads=4, lru_width=64, vocab_size=90, window=12)
ARRAYS = random_weights(CONFIG)
WEIGHTS = weight_source(ARRAYS)
TEXT = np.random.default_rng(3).integers(0, CONFIG.vocab_size, LAYER_TOKENS + 9)
BEFORE, TOKENS = TEXT[:40], TEXT[40:50]
GATE, MUL = "layers.2.temporal_block.rg_lru.recurrent_gate", "layers.0.mlp_block.mul"


def state_after(config, weights, tokens):
    return NumpyReference(config, weights).run(tokens[None])[1]


def observe(config, weights, tokens, state, faults=None) -> Observation:
    """What an artifact would show over tokens [T].

    Faults say for a site what becomes of its value [1, T, n], for all that follow too.
    """
    values: dict[str, np.ndarray] = {}

    def look(site, op, arguments, results):
        value = (faults or {}).get(site, lambda value: value)(results[0])
        values[site] = value[0].copy()
        return value

    model = NumpyReference(config, weights)
    model.look = look
    hidden, after = model.run(tokens[None], state)
    model.logits(hidden)
    return Observation(values=values, gates={}, dtypes={}, state=after)


STATE = state_after(CONFIG, WEIGHTS, BEFORE)


def observed(faults=None, tokens: np.ndarray = TOKENS) -> Observation:
    return observe(CONFIG, WEIGHTS, tokens, STATE, faults)


def compare(observation: Observation, scheme=FLOAT32, compute="fp32") -> list[SiteError]:
    manifest, model = manifest_of(CONFIG, scheme, compute), NumpyReference(CONFIG, WEIGHTS)
    return site_errors(model, manifest, [ObservedCall(TOKENS, STATE, observation)])


def beyond(errors: list[SiteError]) -> list[str]:
    return [error.state or error.site for error in errors if not error.passed]


def test_the_reference_agrees_with_itself_at_every_site_and_state():
    errors = compare(observed())
    shown = [e.site for e in errors if e.state is None]
    assert shown == [site for site in sites(CONFIG) if site != "last_tokens"]
    assert {e.state for e in errors} - {None} == {spec.name for spec in state_specs(CONFIG)}
    states = [(e.site, e.layer) for e in errors if e.state == "layers.1.value"]
    assert states == [("layers.1.temporal_block.attention", 1)]
    assert all(e.rms == e.median == e.excess == 0 and e.length == len(TOKENS) for e in errors)


@pytest.mark.parametrize(
    ("scheme", "compute"),
    [(FLOAT32, "fp32"), (Affine(4, 32, symmetric=False), "fp32"), (Float("float16"), "fp16")],
)
def test_a_gate_in_half_is_seen_beside_other_rounding(scheme, compute):
    observation = observed({GATE: lambda x: x.astype(np.float16).astype(np.float32)})
    assert beyond(compare(observation, scheme, compute)) == [GATE]


def test_one_key_of_many_shows_where_the_oldest_are_amplified():
    config = make_config("ra", width=48, heads=4, lru_width=64, vocab_size=90, window=512)
    weights = random_weights(config)
    weights["layers.1.temporal_block.k_proj.weight"] *= 1e-3  # all keys count alike
    source = weight_source(weights)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, 700)
    quiet = state_after(config, source, tokens)
    narrow = dataclasses.replace(config, window=511)
    rms = []
    for state in (quiet, with_large_state(quiet)):
        without_oldest = {
            name: array[:, 1:] if array.ndim == 3 and array.shape[1] == 512 else array
            for name, array in state.items()
        }
        shown = observe(narrow, source, tokens[:1], without_oldest)
        calls = [ObservedCall(tokens[:1], state, shown)]
        errors = site_errors(NumpyReference(config, source), manifest_of(config), calls)
        rms.append(next(e.rms for e in errors if e.op == "local_attention"))
    assert rms[0] < 0.01 and rms[1] > 0.15


def test_calls_of_several_lengths_read_every_weight_once():
    calls = [ObservedCall(TOKENS[-n:], STATE, observed(tokens=TOKENS[-n:])) for n in (6, 1)]
    calls[1].observed.values[GATE] *= 2
    reads: list[str] = []
    model = NumpyReference(CONFIG, counted(WEIGHTS, reads))
    errors = site_errors(model, manifest_of(CONFIG), calls)
    failed = [e for e in errors if not e.passed]
    assert failed[0].site == GATE and {e.length for e in failed} == {1}
    assert [e.site for e in errors if e.length == 6] == [e.site for e in errors if e.length == 1]
    assert {reads.count(name) for name in WEIGHTS if name != EMBEDDING} == {1}


def test_the_report_has_the_first_and_the_worst():
    """A site that is not shown is judged with the next one; infinite is what is not finite."""
    observation = observed({GATE: lambda x: 1.01 * x, MUL: lambda x: 2 * x})
    report = site_report(compare(observation), ["last_tokens"])
    assert report.first.site == MUL and [e.site for e in report.beyond] == [MUL, GATE]
    assert report.worst(1)[0].rms == pytest.approx(1, rel=1e-5)
    observation = observed({"layers.0.mlp_block.gelu": lambda x: 1.01 * x})
    del observation.values["layers.0.mlp_block.gelu"]
    assert beyond(compare(observation)) == [MUL]
    observation = observed()
    observation.values[MUL][3, 5] = np.nan
    (error,) = (e for e in compare(observation) if not e.passed)
    assert (error.site, error.excess) == (MUL, np.inf)


def rounded(part=""):
    """The weights, those of one part (or all) with a step as large as 4 bits have."""
    changed = dict(ARRAYS)
    for name, array in ARRAYS.items():
        if name.startswith(f"{part}.") or not part:
            step = np.abs(array).max() / 7
            changed[name] = (np.round(array / step) * step).astype(np.float32)
    return weight_source(changed)


def logits(weights) -> np.ndarray:
    model = NumpyReference(CONFIG, weights)
    return model.logits(model.run(TEXT[None, :LAYER_TOKENS])[0])[0]


def test_a_cost_is_that_of_a_model_with_one_part_replaced(monkeypatch):
    """One layer of both is read at a time."""
    reads: list[str] = []
    both = counted(WEIGHTS, reads), counted(rounded(), reads)
    costs = layer_costs(CONFIG, *both, TEXT)
    parts = ["embed_tokens", "layers.0", "layers.1", "layers.2", "final_norm"]
    assert [cost.part for cost in costs] == parts
    layers = [name.split(".")[1] for name in reads if name.startswith("layers.")]
    assert layers == sorted(layers)
    assert {reads.count(name) for name in WEIGHTS if name != EMBEDDING} == {2}, "once of each"
    for cost in costs:
        rows = metrics.compare_logits(logits(WEIGHTS), logits(rounded(cost.part)))
        assert cost.kl == pytest.approx(rows["kl"].mean(), rel=1e-4) and cost.kl > 1e-5
        assert cost.standard_error == pytest.approx(metrics.kl_summary(rows).standard_error, 1e-4)
        assert cost.top1 == rows["top1"].mean()
    monkeypatch.setattr("rgexport.validate.costs._LOGITS_BYTES", 6 * 4 * 90 * 5)
    cut = layer_costs(CONFIG, WEIGHTS, rounded(), TEXT)
    assert [cost.kl for cost in cut] == pytest.approx([cost.kl for cost in costs], rel=1e-5)


SCAN, PRODUCT = "layers.2.temporal_block.rg_lru", "layers.1.mlp_block.mul"


def error(site: str, excess: float = 0.1, **changes) -> SiteError:
    limits = {"limit_rms": 5e-5, "limit_median": 5e-5, "excess": excess}
    values = {"rms": 5e-5 * excess, "median": 2e-5 * excess} | limits | changes
    known = {"op": "linear", "layer": layer_of(site), "state": None, "length": 32, "gain": 0.0}
    return SiteError(site=site, **known | values)


def test_the_first_of_each_layer_and_what_is_in_none():
    excesses = {"embed_tokens": 3, PRODUCT: 7, "layers.1.channel_residual": 90, "logits": 5}
    report = site_report([error(*one) for one in [*excesses.items(), (SCAN, 20)]])
    suspects = find_suspects(report, [], [])
    expected = [(2, SCAN), (1, PRODUCT), (None, "logits"), (None, "embed_tokens")]
    assert [(s.layer, s.site) for s in suspects] == expected
    assert suspects[0].evidence == "rms error 0.001, 20 times its limit (32 tokens)"
    state = error(SCAN, 9, state="layers.2.rg_lru", length=1, median=1.0, limit_median=0.01)
    (suspect,) = find_suspects(site_report([state]), [], [])
    evidence = "the state layers.2.rg_lru after it: median error 1, 9 times its limit (1 token)"
    assert (suspect.layer, suspect.site, suspect.evidence) == (2, SCAN, evidence)


def test_a_weight_belongs_to_the_site_that_uses_it():
    for tensor, site in (
        ("layers.1.mlp_block.up_proj.bias", "layers.1.mlp_block.up_proj"),
        (f"{SCAN}.input_gate_weight", f"{SCAN}.input_gate"),
        (f"{SCAN}.recurrent_param", SCAN),
        ("embed_tokens.weight", "embed_tokens"),
    ):
        failed = Check(name=f"weights.{tensor}.max_steps", value=2.0, limit=0.5, reason="")
        (suspect,) = find_suspects(None, [failed], [])
        assert site in sites(CONFIG) and (suspect.layer, suspect.site) == (layer_of(site), site)
        assert suspect.evidence == f"{tensor} has max_steps 2, limit 0.5"


def test_a_configuration_that_differs_points_to_sites():
    """What two findings point to comes first."""
    report = site_report([error(PRODUCT, 900), error("logits", 4)])
    first, second = find_suspects(report, [], ["soft_cap: 0.0 → 30.0"])
    assert (first.site, second.site) == ("logits", PRODUCT)
    assert first.evidence.endswith("; the configurations differ in soft_cap: 0.0 → 30.0")
    without_report = find_suspects(None, [], ["rope_theta: 1.0 → 2.0", "vocab_size: 7 → 8"])
    assert [s.site for s in without_report] == ["temporal_block.rope_q", "temporal_block.rope_k"]
    for field, kinds in CONFIG_SITES.items():
        assert field in {f.name for f in dataclasses.fields(GriffinConfig)}
        for kind in kinds:
            assert any(f".{site}".endswith(f".{kind}") for site in sites(CONFIG))
