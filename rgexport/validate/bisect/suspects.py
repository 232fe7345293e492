"""Suspects: the sites that wrong ops, wrong weights and a wrong configuration point to."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class _Evidence(NamedTuple):
    site: str
    text: str
    strength: float


def find_suspects(
    report: SiteReport | None, failed: Sequence[Check], config_differences: Sequence[str]
) -> list[Suspect]:
    """Names sites with many findings, then those furthest beyond their limits.

    `failed` are checks of weights.
    """
    beyond = [] if report is None else report.beyond
    by_site: dict[str, list[_Evidence]] = defaultdict(list)
    for one in (
        *_from_sites(beyond),
        *_from_weights(failed),
        *_from_config(config_differences, beyond),
    ):
        by_site[one.site].append(one)
    ranked = sorted(
        by_site.items(),
        key=lambda item: (len(item[1]), max(one.strength for one in item[1])),
        reverse=True,
    )
    return [
        Suspect(layer=layer_of(site), site=site, evidence="; ".join(one.text for one in evidence))
        for site, evidence in ranked
    ]


def _from_sites(beyond: Sequence[SiteError]) -> Iterator[_Evidence]:
    """The first error of each layer, and of each site outside the layers."""
    seen: set[int | str] = set()
    for error in beyond:
        key = error.site if error.layer is None else error.layer
        if key not in seen:
            seen.add(key)
            yield _Evidence(error.site, site_evidence(error), error.excess)


def site_evidence(error: SiteError) -> str:
    what = "" if error.state is None else f"the state {error.state} after it: "
    shares = {
        f"rms error {error.rms:.3g}": error.rms / error.limit_rms,
        f"median error {error.median:.3g}": error.median / error.limit_median,
        f"all values are off by {error.gain:+.2%}": abs(error.gain) / GAIN,
    }
    largest = max(shares, key=lambda measure: shares[measure])
    return f"{what}{largest}, {error.excess:.3g} times its limit ({error.call})"


def _from_weights(failed: Sequence[Check]) -> Iterator[_Evidence]:
    for check in failed:
        tensor, _, measure = check.name.partition(".")[2].rpartition(".")
        text = f"{tensor} has {measure} {check.value:.3g}, limit {check.limit:.3g}"
        yield _Evidence(site_of(tensor), text, check.excess)


def _from_config(differences: Sequence[str], beyond: Sequence[SiteError]) -> Iterator[_Evidence]:
    """For each field, its sites that are beyond their limits; their common names if none is."""
    sites = dict.fromkeys(error.site for error in beyond)
    for difference in differences:
        for kind in CONFIG_SITES.get(difference.partition(":")[0], ()):
            named = [site for site in sites if f".{site}".endswith(f".{kind}")]
            for site in named or [kind]:
                yield _Evidence(site, f"the configurations differ in {difference}", 1.0)
