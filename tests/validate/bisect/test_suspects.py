import dataclasses

import pytest

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.sites import sites
from rgexport.tables import render
from rgexport.validate.bisect.layer_costs import LayerCost
from rgexport.validate.bisect.site_errors import SiteError, layer_of
from rgexport.validate.bisect.sites import site_report
from rgexport.validate.bisect.suspects import CONFIG_SITES, Suspect, find_suspects
from rgexport.validate.checks import Check
from rgexport.validate.report.result_tables import bisect_tables
from tests.models import make_config

SCAN = "layers.2.temporal_block.rg_lru"


def error(site: str, excess: float = 0.1, **changes) -> SiteError:
    made = SiteError(
        site=site,
        op="linear",
        layer=layer_of(site),
        state=None,
        length=32,
        rms=5e-5 * excess,
        median=2e-5 * excess,
        limit_rms=5e-5,
        limit_median=5e-5,
        excess=excess,
    )
    return dataclasses.replace(made, **changes)


def failed(name: str, value: float = 2.0) -> Check:
    return Check(name=f"weights.{name}", value=value, limit=0.5, reason="")


def test_the_first_of_each_layer_and_what_is_in_none():
    sites = {
        "embed_tokens": 3,
        "layers.1.mlp_block.mul": 7,
        "layers.1.channel_residual": 90,
        SCAN: 20,
        "logits": 5,
    }
    report = site_report([error(site, excess) for site, excess in sites.items()])
    found = find_suspects(report, [], [])
    assert [(s.layer, s.site) for s in found] == [
        (2, SCAN),
        (1, "layers.1.mlp_block.mul"),
        (None, "logits"),
        (None, "embed_tokens"),
    ]
    assert found[0].evidence == "rms error 0.001, 20 times its limit (32 tokens)"


def test_evidence_of_a_state():
    state = error(SCAN, 9, state="layers.2.rg_lru", length=1, median=1.0, limit_median=0.01)
    (found,) = find_suspects(site_report([state]), [], [])
    assert found == Suspect(
        layer=2,
        site=SCAN,
        evidence="the state layers.2.rg_lru after it: median error 1, 9 times its limit (1 token)",
    )


@pytest.mark.parametrize(
    ("tensor", "site"),
    [
        ("layers.1.mlp_block.up_proj.weight", "layers.1.mlp_block.up_proj"),
        ("layers.1.mlp_block.up_proj.bias", "layers.1.mlp_block.up_proj"),
        ("layers.2.temporal_block.conv_1d.weight", "layers.2.temporal_block.conv_1d"),
        ("layers.2.temporal_block.rg_lru.input_gate_weight", f"{SCAN}.input_gate"),
        ("layers.2.temporal_block.rg_lru.recurrent_gate_bias", f"{SCAN}.recurrent_gate"),
        ("layers.2.temporal_block.rg_lru.recurrent_param", SCAN),
        ("layers.0.temporal_pre_norm.weight", "layers.0.temporal_pre_norm"),
        ("embed_tokens.weight", "embed_tokens"),
        ("final_norm.weight", "final_norm"),
    ],
)
def test_a_weight_belongs_to_the_site_that_uses_it(tensor, site):
    config = make_config("rar", width=32, heads=4)
    assert site in sites(config)
    (found,) = find_suspects(None, [failed(f"{tensor}.max_steps")], [])
    assert (found.layer, found.site) == (layer_of(site), site)
    assert found.evidence == f"{tensor} has max_steps 2, limit 0.5"


def test_what_two_findings_point_to_comes_first():
    report = site_report([error("layers.0.mlp_block.mul", 900), error("logits", 4)])
    first, second = find_suspects(report, [], ["soft_cap: 0.0 → 30.0"])
    assert (first.layer, first.site) == (None, "logits")
    assert first.evidence.endswith("; the configurations differ in soft_cap: 0.0 → 30.0")
    assert second.site == "layers.0.mlp_block.mul"


def test_a_configuration_that_differs_points_to_the_sites_beyond():
    places = [f"layers.{i}.temporal_block.attention" for i in (1, 4)]
    errors = [error(places[0], 5), error("layers.2.mlp_block.mul"), error(places[1], 6)]
    report = site_report(errors)
    found = find_suspects(report, [], ["window: 2047 → 2048"])
    assert [s.site for s in found] == places[::-1]
    assert all("window: 2047 → 2048" in s.evidence for s in found)


def test_a_configuration_that_differs_without_a_site_report():
    found = find_suspects(None, [], ["rope_theta: 1.0 → 2.0", "vocab_size: 7 → 8"])
    assert [(s.layer, s.site) for s in found] == [
        (None, "temporal_block.rope_q"),
        (None, "temporal_block.rope_k"),
    ]


def test_tables():
    report = site_report([error(f"layers.{i}.mlp_block.mul", i / 8) for i in range(12)], ["gelu"])
    costs = [
        LayerCost(part=f"layers.{i}", kl=i * 1e-3, standard_error=1e-4, top1=1 - i / 100)
        for i in range(20)
    ]
    lines = render(bisect_tables(report, costs, find_suspects(report, [], []))).splitlines()
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert text.index("Suspects") < text.index("Per-op check") < text.index("Layers")
    assert "3 of 12 beyond the limit; 1 not shown by the engine" in text
    assert "layers.8.mlp_block.mul" in text and "layers.1.mlp_block.mul" not in text
    assert "layers.19 0.019 ± 0.0001 10.0 % 81.0 %" in text
    assert "… and 10 cheaper ones 23.7 %" in text
    assert list(bisect_tables(None, None, [])) == [] == find_suspects(None, [], [])
    report = site_report([error(f"layers.{i}.mlp_block.mul", 2) for i in range(40)])
    text = render(bisect_tables(report, None, find_suspects(report, [], [])))
    assert "… and 10 more beyond the limit" in text and text.count("… and 10 more") == 2


def test_fields_of_the_configuration_have_sites():
    config = make_config("ra", width=32, heads=4)
    for field, kinds in CONFIG_SITES.items():
        assert field in {f.name for f in dataclasses.fields(GriffinConfig)}
        for kind in kinds:
            assert any(f".{site}".endswith(f".{kind}") for site in sites(config))
