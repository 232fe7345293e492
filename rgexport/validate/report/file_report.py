"""The comparison with a reference file as text and tables for a terminal."""

from collections.abc import Iterator, Sequence

from rgexport.tables import Row, Table
from rgexport.validate.reference.against import AgainstFile, PromptResult
from rgexport.validate.reference.stream_errors import LayerError
from rgexport.validate.states import worst
from rgexport.validate.weights.sketch_errors import SketchError

PROMPT = ("tokens", "KL mean", "top-1", "worst state", "greedy")

_LAYER = ("error", "limit", "worst at position")
DRIFT = "Recurrent states inside the longest prompt"
STREAM = "Residual stream after each layer"
_SKETCH = ("error", "projection", "noise", "worst row")
_EXACT = 0.05
"""Noise below that is the sketch's own rounding."""
WORST = 5
"""Layers, and tensors of one kind, that are shown."""


def file_parts(found: AgainstFile) -> Iterator[str | Table]:
    """What it was compared with, and how far the two are apart."""
    computed = ", ".join(f"{key} {value}" for key, value in found.computed.items())
    yield f"reference file: {found.path}, {found.model} ({computed})"
    yield from reference_warnings(found)
    yield ""
    yield file_table(found)
    rows = ((prompt.name, *prompt_cells(prompt)) for prompt in found.prompts)
    yield Table("Prompts", ("prompt", *PROMPT), rows, PROMPT)
    if found.drift:
        drifted = [(f"{d.position:,} tokens", f"{worst(d.states):.3g}") for d in found.drift]
        yield Table(DRIFT, ("after", "worst"), drifted, ("worst",))
    yield sketch_table(found)
    if found.layers:
        yield Table(STREAM, ("layer", *_LAYER), _layer_rows(found.layers), _LAYER)
        yield from first_layer(found)


def first_layer(found: AgainstFile) -> Iterator[str]:
    """The layer in which the artifact begins to differ, if there is one and it was looked for."""
    for error in found.layers or ():
        if not error.passed:
            yield (
                f"layer {error.layer} is the first whose residual stream leaves the reference's: "
                f"{error.relative_rms:.3g}, limit {error.limit:g}"
            )
            return


def reference_warnings(found: AgainstFile) -> Iterator[str]:
    """What makes the comparison one with another model."""
    if not found.same_files:
        yield "the reference file is of other weight files than the artifact was made from"
    for difference in found.config_differences:
        yield f"the configurations differ in {difference}"


def _layer_rows(layers: Sequence[LayerError]) -> Iterator[Row]:
    """The worst ones."""
    for e in sorted(layers, key=lambda e: (e.passed, -e.relative_rms))[:WORST]:
        yield f"{e.layer}", f"{e.relative_rms:.3g}", f"{e.limit:.3g}", f"{e.worst_position:,}"
    if len(layers) > WORST:
        yield f"… and {len(layers) - WORST} better ones", "", "", ""


def sketch_table(found: AgainstFile) -> Table:
    """How far the stored weights are from what the file's sketches tell of the reference's."""
    title, header = "Weights, by the reference file's sketches", ("tensor", "stored", *_SKETCH)
    return Table(title, header, list(_sketch_rows(found.weights)), _SKETCH)


def _sketch_rows(errors: Sequence[SketchError]) -> Iterator[Row]:
    """The noisiest of each scheme, and one line for what was stored as it was."""
    for scheme in dict.fromkeys(e.scheme for e in errors):
        group = [e for e in errors if e.scheme == scheme]
        inexact = sorted((e for e in group if not e.noise < _EXACT), key=lambda e: -e.noise)
        for e in inexact[:WORST]:
            numbers = f"{e.relative_error:.3g}", f"{e.projection:.5f}", f"{e.noise:.3g}"
            yield (e.name, scheme, *numbers, f"{e.worst_row:.3g}")
        if len(inexact) > WORST:
            yield f"… and {len(inexact) - WORST} better ones", scheme, "", "", "", ""
        if exact := len(group) - len(inexact):
            yield f"{exact} tensors, as they were", scheme, "0", "1", "0", "0"


def bounded(best: float, low: float, high: float) -> str:
    """`0.0123`, and its bounds where three digits do not hold for all of them."""
    short = f"{best:.3g}"
    same = f"{low:.3g}" == short == f"{high:.3g}"
    return short if same else f"{short} ({low:.3g} … {high:.3g})"


def file_table(found: AgainstFile) -> Table:
    """What was measured over all prompts."""
    title = f"Against the reference file ({found.positions:,} positions)"
    return Table(title, ("measured", "value"), list(_file_rows(found)), ("value",))


def _file_rows(found: AgainstFile) -> Iterator[Row]:
    kl, low, high = found.kl, found.kl_low, found.kl_high
    full = f" ({found.full_positions} positions)"
    total, common = found.greedy
    yield f"max |Δlogit|{full}", f"{found.logits.max:.3g}"
    yield f"RMS logit error, of their spread{full}", f"{found.logits.relative_rms:.3g}"
    yield "KL mean (nats)", f"{bounded(kl.mean, low.mean, high.mean)} ± {kl.standard_error:.1g}"
    if found.full_positions < found.positions:
        exact = found.kl_full
        yield f"KL mean{full}", f"{exact.mean:.3g} ± {exact.standard_error:.1g}"
    yield "KL median", bounded(kl.median, low.median, high.median)
    yield "KL 99th percentile", bounded(kl.p99, low.p99, high.p99)
    yield "KL max", f"{bounded(kl.max, low.max, high.max)} at {kl.worst_position}"
    yield "width of KL's interval, of itself", f"{found.kl_width:.1g}"
    yield "top-1 agreement", f"{100 * found.agreement.top1:.2f} %"
    yield "top-5 agreement", f"{100 * found.agreement.top5:.2f} %"
    yield "largest margin that flipped", f"{found.agreement.largest_flip_margin:.3g}"
    yield "worst state", f"{worst(found.states):.3g}"
    if likelihood := found.likelihood:
        yield "perplexity: reference", f"{likelihood.perplexity:.4g}"
        yield "perplexity: artifact", f"{likelihood.perplexity_candidate:.4g}"
        if likelihood.bits_per_byte is not None and likelihood.bits_per_byte_candidate is not None:
            yield "bits per byte: reference", f"{likelihood.bits_per_byte:.4g}"
            yield "bits per byte: artifact", f"{likelihood.bits_per_byte_candidate:.4g}"
        delta = f"{likelihood.delta:+.2g} ± {likelihood.delta_standard_error:.1g}"
        yield "Δ nats per token", delta
    if total:
        yield "greedy tokens in common", f"{common} of {total} tokens"


def prompt_cells(p: PromptResult) -> tuple[str, ...]:
    """What was measured on one prompt, in the order of `PROMPT`."""
    return (
        f"{p.tokens:,}",
        bounded(p.kl, p.kl_low, p.kl_high),
        f"{100 * p.top1:.2f} %",
        f"{p.worst_state:.3g}",
        f"{p.greedy_common} of {p.greedy_tokens}" if p.greedy_tokens else "",
    )
