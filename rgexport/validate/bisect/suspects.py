"""What points where: the sites, the weights and the configuration that look wrong, together."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rgexport.validate.bisect.site_errors import SiteError, layer_of
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.checks import Check

CONFIG_SITES: dict[str, tuple[str, ...]] = {
    "soft_cap": ("logits",),
    "embedding_scale": ("embed_tokens",),
    "window": ("temporal_block.attention",),
    "rope_dims": ("temporal_block.rope_q", "temporal_block.rope_k"),
    "rope_theta": ("temporal_block.rope_q", "temporal_block.rope_k"),
    "rms_eps": ("temporal_pre_norm", "channel_pre_norm", "final_norm"),
}
"""Field of the configuration → the sites that it decides about, in every layer that has them.

The others are shapes: a model in which they differ cannot be compared.
"""
_PART = re.compile(r"[._](weight|bias|recurrent_param)$")
"""What a tensor's name has behind the site that uses it."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A place that something points to; `layer` is None where it is in none or in many."""

    layer: int | None
    site: str
    evidence: str


@dataclass
class _Trace:
    """All that points to one site; `strength` is in units of a limit."""

    site: str
    evidence: list[str] = field(default_factory=list)
    strength: float = 0.0

    def add(self, evidence: str, strength: float) -> None:
        self.evidence.append(evidence)
        self.strength = max(self.strength, strength)


def find_suspects(
    report: SiteReport | None, failed: Sequence[Check], config_differences: Sequence[str]
) -> list[Suspect]:
    """Puts together what may explain that an artifact is not what it should be.

    Args:
        report: the sites, where they could be looked at.
        failed: checks of weights that did not pass.
        config_differences: as `source.config_differences` gives them.

    Returns:
        The strongest first: what several findings point to, then by how far they are beyond
        their limits. Empty if nothing is beyond one and the configurations agree.
    """
    traces: dict[str, _Trace] = {}
    findings = [*_from_sites(report), *_from_weights(failed)]
    beyond = [] if report is None else [error.site for error in report.beyond]
    findings += _from_config(config_differences, beyond)
    for site, evidence, strength in findings:
        traces.setdefault(site, _Trace(site)).add(evidence, strength)
    ranked = sorted(traces.values(), key=lambda trace: (-len(trace.evidence), -trace.strength))
    return [
        Suspect(layer=layer_of(trace.site), site=trace.site, evidence="; ".join(trace.evidence))
        for trace in ranked
    ]


_Finding = tuple[str, str, float]
"""A site, what was found there, and how strong that is."""


def _from_sites(report: SiteReport | None) -> Iterator[_Finding]:
    """The first one of each layer."""
    layers: set[int | str] = set()
    for error in [] if report is None else report.beyond:
        place = error.site if error.layer is None else error.layer
        if place not in layers:
            layers.add(place)
            yield error.site, site_evidence(error), error.excess


def site_evidence(error: SiteError) -> str:
    """What is wrong at a site, in words."""
    what = "" if error.state is None else f"the state {error.state} after it: "
    by_rms = error.rms / error.limit_rms >= error.median / error.limit_median
    measure, value = ("rms", error.rms) if by_rms else ("median", error.median)
    return (
        f"{what}{measure} error {value:.3g}, {error.excess:.3g} times its limit "
        f"({error.length} token{'s' if error.length > 1 else ''})"
    )


def _from_weights(failed: Sequence[Check]) -> Iterator[_Finding]:
    for check in failed:
        tensor, _, measure = check.name.partition(".")[2].rpartition(".")
        found = f"{tensor} has {measure} {check.value:.3g}, limit {check.limit:.3g}"
        yield _PART.sub("", tensor), found, check.value / check.limit


def _from_config(differences: Sequence[str], beyond: Sequence[str]) -> Iterator[_Finding]:
    """For each field, its sites that are beyond their limits; their common names if none is."""
    for difference in differences:
        for kind in CONFIG_SITES.get(difference.partition(":")[0], ()):
            sites = dict.fromkeys(site for site in beyond if f".{site}".endswith(f".{kind}"))
            for site in sites or (kind,):
                yield site, f"the configurations differ in {difference}", 1.0
