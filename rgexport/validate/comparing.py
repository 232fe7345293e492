"""Compares what needs no session of the artifact: weights, ops, layers."""

from rgexport.errors import RequestError
from rgexport.progress import note
from rgexport.runtimes.environment import environment
from rgexport.validate.bisect.layer_costs import LayerCost, layer_costs
from rgexport.validate.bisect.sites import SiteReport, look_at_sites
from rgexport.validate.opening import Opened
from rgexport.validate.result import Result, TextInfo, describe_artifact, describe_source
from rgexport.validate.running import Ran
from rgexport.validate.speed import measure_speed
from rgexport.validate.structure.compare import compare_structure
from rgexport.validate.thresholds import tolerance
from rgexport.validate.weights.reproduced import Reproduced, reproduce
from rgexport.validate.weights.tensor_errors import WeightError, weight_errors


def compare_all(opened: Opened, ran: Ran) -> Result:
    """Compares the artifact with its references, part by part; the result has no checks yet."""
    manifest, text, tokens = opened.manifest, opened.text, len(opened.text.tokens)
    windows = tokens / manifest.config.window
    dequantized, *of_original = ran.measured.comparisons
    return Result(
        artifact=describe_artifact(opened.path, manifest),
        source=describe_source(manifest.source.name, opened.original),
        text=TextInfo(text.name, tokens, windows, text.bytes, text.truncated),
        engine=ran.info,
        twin=dequantized,
        original=of_original[0] if of_original else None,
        equivalences=ran.measured.equivalences,
        weights=_weights(opened, ran),
        cost=ran.cost,
        reproduced=_reproduced(opened),
        sites=_sites(opened, ran),
        layers=_layers(opened),
        suspects=None,
        reference=ran.against_file,
        speed=measure_speed(opened.artifact) if opened.request.bench else None,
        tolerance=tolerance(manifest),
        checks=[],
        environment=environment(),
        continuations=ran.continuations,
        min_quality=opened.request.min_quality,
        structure=compare_structure(opened.artifact, opened.request.reference),
        identity=opened.identity,
    )


def _weights(opened: Opened, ran: Ran) -> list[WeightError] | None:
    if opened.original is None:
        return None
    original, stored = opened.original.checkpoint.weights, opened.artifact.weights
    manifest = opened.manifest
    return weight_errors(
        original, stored, manifest.tensors, weighted=manifest.weighted, inputs=ran.inputs
    )


def _reproduced(opened: Opened) -> list[Reproduced] | None:
    if opened.original is None or opened.statistics is None:
        return None
    return reproduce(opened.artifact, opened.original.checkpoint.weights, opened.statistics)


def _sites(opened: Opened, ran: Ran) -> SiteReport | None:
    """Every op, from the state after the text; None where the engine shows none."""
    original, text = opened.original, opened.text
    config = opened.manifest.config if original is None else original.checkpoint.config
    try:
        return look_at_sites(opened.artifact, config, ran.measured.ending.gave.state, text.tokens)
    except RequestError as error:
        note(f"the ops were not compared one by one: {error}")
        return None


def _layers(opened: Opened) -> list[LayerCost] | None:
    if opened.original is None or not opened.request.bisect:
        return None
    source, stored = opened.original.checkpoint, opened.artifact.weights
    return layer_costs(source.config, source.weights, stored, opened.text.tokens)
