"""Suspects: the sites that wrong ops, wrong weights and a wrong configuration point to."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rgexport.griffin.layout import site_of
from rgexport.validate.bisect.site_limits import GAIN
from rgexport.validate.bisect.sites import SiteError, SiteReport, layer_of
from rgexport.validate.checks import Check

_ROPE = ("temporal_block.rope_q", "temporal_block.rope_k")
CONFIG_SITES: dict[str, tuple[str, ...]] = {
    "soft_cap": ("logits",),
    "embedding_scale": ("embed_tokens",),
    "window": ("temporal_block.attention",),
    "rope_dims": _ROPE,
    "rope_theta": _ROPE,
    "rms_eps": ("temporal_pre_norm", "channel_pre_norm", "final_norm"),
}
"""Field of the configuration → the sites that depend on it; models of other shapes are refused."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A site that evidence points to; `layer` is None where it is in none or in many."""

    layer: int | None
    site: str
    evidence: str


def find_suspects(
    report: SiteReport | None, failed: Sequence[Check], config_differences: Sequence[str]
) -> list[Suspect]:
    """Names sites with many findings, then those furthest beyond their limits.

    A finding is the first error of a layer, a failed check of weights, or a different
    configuration.
    """
    beyond = [] if report is None else report.beyond
    strengths: dict[str, dict[str, float]] = defaultdict(dict)
    seen: set[int | str] = set()
    for error in beyond:
        key = error.site if error.layer is None else error.layer
        if key not in seen:
            seen.add(key)
            strengths[error.site][site_evidence(error)] = error.excess
    for check in failed:
        tensor, _, measure = check.name.partition(".")[2].rpartition(".")
        text = f"{tensor} has {measure} {check.value:.3g}, limit {check.limit:.3g}"
        strengths[site_of(tensor)][text] = check.excess
    for difference in config_differences:
        for kind in CONFIG_SITES.get(difference.partition(":")[0], ()):
            named = [e.site for e in beyond if f".{e.site}".endswith(f".{kind}")]
            for site in named or [kind]:
                strengths[site][f"the configurations differ in {difference}"] = 1.0
    ranked = sorted(strengths.items(), key=lambda item: (-len(item[1]), -max(item[1].values())))
    return [
        Suspect(layer=layer_of(site), site=site, evidence="; ".join(evidence))
        for site, evidence in ranked
    ]


def site_evidence(error: SiteError) -> str:
    what = "" if error.state is None else f"the state {error.state} after it: "
    shares = {
        f"rms error {error.rms:.3g}": error.rms / error.limit_rms,
        f"median error {error.median:.3g}": error.median / error.limit_median,
        f"all values are off by {error.gain:+.2%}": abs(error.gain) / GAIN,
    }
    largest = max(shares, key=lambda measure: shares[measure])
    return f"{what}{largest}, {error.excess:.3g} times its limit ({error.call})"
