"""The comparison with a reference file as text and tables for a terminal."""

from collections.abc import Iterator

from rgexport import tables
from rgexport.tables import Row, Table
from rgexport.validate.against import AgainstFile
from rgexport.validate.result import FileResult
from rgexport.validate.states import worst

_PROMPT = ("tokens", "KL mean", "first choice", "worst state", "greedy")


def render_file(result: FileResult) -> str:
    """The report of a comparison with nothing but a reference file."""
    return tables.render(_parts(result))


def _parts(r: FileResult) -> Iterator[str | Table]:
    a, engine, env = r.artifact, r.engine, r.environment
    failed = [check for check in r.checks if not check.passed]
    counts = f"{len(failed)} of {len(r.checks)} checks failed" if failed else "every check passed"
    yield (
        f"{'FAIL' if failed else 'PASS'}  {a.path}: {counts}\n\n"
        f"{a.name}, {a.numbers}; "
        f"{engine.engine} {engine.engine_version}, {engine.threads} threads\n"
        "twin: left out, it takes torch (pip install 'rgexport[export]')\n"
    )
    for check in failed:
        yield f"FAILED  {check.name} is {check.value:.3g}, limit {check.limit:g} ({check.reason})"
    yield from file_parts(r.reference)
    yield f"{env['cpu']}, {env['cores']} cores, {env['system']}; Python {env['python']}"


def file_parts(found: AgainstFile) -> Iterator[str | Table]:
    """What it was compared with, and how far the two are apart."""
    computed = ", ".join(f"{key} {value}" for key, value in found.computed.items())
    yield f"reference file: {found.path}, {found.model} ({computed})"
    if not found.same_files:
        yield "it is of other weight files than the artifact was made from"
    for difference in found.config_differences:
        yield f"the configurations differ in {difference}"
    yield ""
    title = f"Against the reference file ({found.positions:,} positions)"
    yield Table(title, ("", "value"), file_rows(found), ("value",))
    yield Table("Prompts", ("prompt", *_PROMPT), _prompt_rows(found), _PROMPT)


def bounded(best: float, low: float, high: float) -> str:
    """`0.0123`, and its bounds where three digits do not hold for all of them."""
    short = f"{best:.3g}"
    same = f"{low:.3g}" == short == f"{high:.3g}"
    return short if same else f"{short} ({low:.3g} … {high:.3g})"


def file_rows(found: AgainstFile) -> Iterator[Row]:
    """What was measured over all prompts."""
    kl, low, high = found.kl, found.kl_low, found.kl_high
    full = f" ({found.full_positions} positions)"
    total, common = found.greedy
    yield f"max |Δlogit|{full}", f"{found.logits.max:.3g}"
    yield f"rms Δlogit of their spread{full}", f"{found.logits.relative_rms:.3g}"
    yield "KL mean (nats)", f"{bounded(kl.mean, low.mean, high.mean)} ± {kl.standard_error:.1g}"
    yield "KL median", bounded(kl.median, low.median, high.median)
    yield "KL 99th percentile", bounded(kl.p99, low.p99, high.p99)
    yield "KL max", f"{bounded(kl.max, low.max, high.max)} at {kl.worst_position}"
    yield "width of KL's interval, of itself", f"{found.kl_width:.1g}"
    yield "same first choice", f"{100 * found.agreement.top1:.2f} %"
    yield "same first five", f"{100 * found.agreement.top5:.2f} %"
    yield "largest lead that flipped", f"{found.agreement.largest_flip_margin:.3g}"
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
        yield "greedy text in common", f"{common} of {total} tokens"


def _prompt_rows(found: AgainstFile) -> Iterator[Row]:
    for p in found.prompts:
        yield (
            p.name,
            f"{p.tokens:,}",
            bounded(p.kl, p.kl_low, p.kl_high),
            f"{100 * p.top1:.2f} %",
            f"{p.worst_state:.3g}",
            f"{p.greedy_common} of {p.greedy_tokens}" if p.greedy_tokens else "",
        )
