"""Suspects: the sites that wrong ops, wrong weights and a wrong configuration point to."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rgexport.griffin.layout import site_of
from rgexport.validate.bisect.site_limits import GAIN
from rgexport.validate.bisect.site_report import SiteReport
from rgexport.validate.bisect.sites import SiteError, layer_of
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
    beyond: list[SiteError] = []
    if report is not None:
        beyond = report.beyond

    # Site → evidence → how strong it is, in units of a limit.
    findings: dict[str, dict[str, float]] = defaultdict(dict)
    for error in _first_of_each_layer(beyond):
        findings[error.site][site_evidence(error)] = error.excess
    for check in failed:
        tensor, _, quantity = check.name.partition(".")[2].rpartition(".")
        text = f"{tensor} has {quantity} {check.value:.3g}, limit {check.limit:.3g}"
        findings[site_of(tensor)][text] = check.excess
    for difference in config_differences:
        for site in _dependent_sites(difference, beyond):
            findings[site][f"the configurations differ in {difference}"] = 1.0

    suspects = []
    for site in sorted(findings, key=lambda site: _rank(findings[site])):
        evidence = "; ".join(findings[site])
        suspects.append(Suspect(layer=layer_of(site), site=site, evidence=evidence))
    return suspects


def _rank(strengths: dict[str, float]) -> tuple[int, float]:
    """Sorts sites with many findings first, then those with the strongest."""
    return -len(strengths), -max(strengths.values())


def _first_of_each_layer(errors: Sequence[SiteError]) -> Iterator[SiteError]:
    """Yields the first error of each layer, and of each site outside of the layers."""
    seen: set[int | str] = set()
    for error in errors:
        key = error.site if error.layer is None else error.layer
        if key not in seen:
            seen.add(key)
            yield error


def _dependent_sites(difference: str, beyond: Sequence[SiteError]) -> Iterator[str]:
    """Yields the sites that depend on a field, by its difference as text.

    These are the sites with errors beyond their limits, or a general name if there is none.
    """
    field = difference.partition(":")[0]
    for kind in CONFIG_SITES.get(field, ()):
        named = [error.site for error in beyond if f".{error.site}".endswith(f".{kind}")]
        yield from named or [kind]


def site_evidence(error: SiteError) -> str:
    """Describes the largest of an error's quantities, in units of its limit."""
    prefix = ""
    if error.state is not None:
        prefix = f"the state {error.state} after it: "
    shares = {
        f"rms error {error.rms:.3g}": error.rms / error.limit_rms,
        f"median error {error.median:.3g}": error.median / error.limit_median,
        f"all values are off by {error.gain:+.2%}": abs(error.gain) / GAIN,
    }
    largest = max(shares, key=lambda text: shares[text])
    return f"{prefix}{largest}, {error.excess:.3g} times its limit ({error.call})"
