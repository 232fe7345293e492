"""Compares what can be compared without the artifact's session: weights, ops, layers."""

from dataclasses import dataclass

from rgexport.errors import RequestError
from rgexport.progress import note
from rgexport.validate.bisect.layer_costs import LayerCost, layer_costs
from rgexport.validate.bisect.sites import SiteReport, look_at_sites
from rgexport.validate.opening import Opened
from rgexport.validate.reference.against import AgainstFile, with_layers
from rgexport.validate.running import Ran
from rgexport.validate.speed import Speed, measure_speed
from rgexport.validate.weights.weight_errors import WeightError, weight_errors


@dataclass(frozen=True, kw_only=True)
class Compared:
    """All that is None was not asked for, or takes torch, the original or another engine."""

    weights: list[WeightError] | None
    sites: SiteReport | None
    layers: list[LayerCost] | None
    against_file: AgainstFile | None
    speed: Speed | None


def compare_all(opened: Opened, ran: Ran) -> Compared:
    """Compares the artifact with its references, part by part."""
    return Compared(
        weights=_weights(opened),
        sites=_sites(opened, ran),
        layers=_layers(opened),
        against_file=_against_file(opened, ran),
        speed=measure_speed(opened.artifact) if opened.request.bench else None,
    )


def _weights(opened: Opened) -> list[WeightError] | None:
    if opened.original is None:
        return None
    manifest, original = opened.manifest, opened.original.checkpoint.weights
    stored = opened.artifact.weights
    return weight_errors(original, stored, manifest.tensors, weighted=manifest.weighted)


def _sites(opened: Opened, ran: Ran) -> SiteReport | None:
    """Every op, from the state behind the text; None where the engine shows none."""
    if opened.make is None:
        return None
    original, text = opened.original, opened.text
    config = opened.manifest.config if original is None else original.checkpoint.config
    state, device = ran.measured.state, opened.request.device
    try:
        return look_at_sites(opened.artifact, config, state, text.tokens, device)
    except RequestError as error:
        note(f"the ops were not looked at one by one: {error}")
        return None


def _layers(opened: Opened) -> list[LayerCost] | None:
    if opened.original is None or not opened.request.bisect:
        return None
    source, stored = opened.original.checkpoint, opened.artifact.weights
    tokens, device = opened.text.tokens, opened.request.device
    return layer_costs(source.config, source.weights, stored, tokens, device)


def _against_file(opened: Opened, ran: Ran) -> AgainstFile | None:
    """What the reference file told, with its layers where the states before them were kept."""
    reference, found = opened.request.reference, ran.against_file
    if reference is None or found is None or not opened.request.bisect:
        return found
    try:
        return with_layers(found, opened.artifact, reference, ran.before)
    except RequestError as error:
        note(f"the layers were not looked at one by one: {error}")
        return found
